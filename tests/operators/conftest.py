"""The library that `make operators` has built, and sessions that use it."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

LIBRARY = Path(os.environ.get("DYNEXPORT_CPU_OPERATORS", "plugins/cpu/lib/libdynexport_cpu.so")).resolve()
sys.path.append(str(Path(__file__).parent.parent / "plugins"))

KERNELS = ("avx512-bf16", "avx512-vnni", "avx2", "portable")

Run = Callable[..., np.ndarray]


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set in turn."""
    name: str = request.param
    monkeypatch.setenv("DYNEXPORT_CPU_KERNELS", name)
    used = ctypes.CDLL(str(LIBRARY)).dynexport_cpu_kernels
    used.restype = ctypes.c_char_p
    if used() is None:
        pytest.skip(f"waits for a processor with {name}")
    return name


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options of a session that has the operators."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(LIBRARY))
    return options


@pytest.fixture
def run() -> Run:
    """Run a model of one operator with the library."""

    def ran(made: bytes, x: np.ndarray, threads: int = 1, **inputs: np.ndarray) -> np.ndarray:
        session = onnxruntime.InferenceSession(made, session_options(threads), providers=["CPUExecutionProvider"])
        found: np.ndarray = session.run(None, {"x": x, **inputs})[0]
        return found

    return ran
