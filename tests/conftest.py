"""What tests of several folders share: tiny models, saved once a session."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import settings
from tiny_models import FAMILIES, VARIANTS, save_model

# A job in the background may be started with interrupts ignored, and commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
# CI tries the same examples every time, so that a change is judged by what it changes; elsewhere they are new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# The collector of cycles would look at thousands of tests, and at all of PyTorch, again and again.
gc.disable()

# Where two processes run the suite on two cores, second threads of one would take the core from the other: a tenth of
# the time. A test that names a number of threads has them.
if "PYTEST_XDIST_WORKER" in os.environ:

    class _OneThread(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.intra_op_num_threads = 1

    onnxruntime.SessionOptions = _OneThread

# onnxscript asks for an operator's signature at every node, and onnx-ir makes it from the schema each time: a quarter
# of the time of a conversion, of which the suite makes thousands.
_signature = ir.schemas.OpSignature.from_op_schema
_signatures: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}


def _remembered(schema: onnx.defs.OpSchema) -> ir.schemas.OpSignature:
    key = schema.domain, schema.name, schema.since_version
    if key not in _signatures:
        _signatures[key] = _signature(schema)
    return _signatures[key]


ir.schemas.OpSignature.from_op_schema = staticmethod(_remembered)

# Tests that start servers and processes, or send signals: on a machine that is busy with other things, one may take
# longer than its test waits. Such a test runs once more if it fails; pytest lists it as rerun.
_RUN_ONCE_MORE = (
    "browser/",
    "bundle/test_write.py",
    "cli/test_process.py",
    "cpp/test_service",
    "docs/test_docs.py",
    "engines/test_engine_build.py",
    "runtime/test_bench.py",
    "runtime/test_constraint.py",
    "runtime/test_render_process.py",
    "runtime/test_startup.py",
    "scale/",
    "serving/",
    "triton/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(_RUN_ONCE_MORE):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What tests build is remembered apart from what the user has built."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model, or of a variant's, by its name."""
    import torch

    torch.set_num_threads(1)  # more only get into the way of each other at these sizes

    @cache
    def save(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        save_model(directory, *VARIANTS.get(name, (name, FAMILIES.get(name, {}))))
        return directory

    return save
