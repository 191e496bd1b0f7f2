"""The programs of the C++ runtime that `make cpp` has built, and bundles to run them on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from dynexport.plugins.cpu_library import VARIABLE, CpuLibrary, find_library

# Where `make cpp` built, and ONNX Runtime's library, which the programs open at run time.
BUILD = Path(os.environ.get("DYNEXPORT_CPP", "build/cpp")).resolve()
LIBRARY = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))

# Bundles of every form, the tests of servers, and checkpoints of other code.
sys.path += [str(Path(__file__).parent.parent / folder) for folder in ("execution", "serving", "strategies")]

Run = Callable[..., "subprocess.CompletedProcess[Any]"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a built program: its name, its arguments, its standard input as bytes."""

    def started(name: str, *arguments: object, stdin: bytes = b"", timeout: float = 300) -> Any:
        command: Sequence[str] = [str(BUILD / name), *map(str, arguments)]
        environment = os.environ | {"DYNEXPORT_ONNXRUNTIME": str(LIBRARY)}
        if isinstance(operators := find_library(), CpuLibrary):
            environment[VARIABLE] = str(operators.path)
        return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, env=environment)

    return started


@pytest.fixture(scope="session")
def program() -> Sequence[str]:
    """The words that start the service, before its bundles and options."""
    return [str(BUILD / "dynexport-serve"), "--onnxruntime", str(LIBRARY)]
