"""The part of ``gpu-check`` that runs the C++ runtime, on stand-ins for TensorRT and a GPU in both languages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import BUILD, LIBRARY
from standin_machine import HERE, STANDIN, VERSION, engines, install, needs_standins

from dynexport.exporter.cli import gpu_check_cpp
from dynexport.exporter.cli.gpu_checks import Check, Engines
from dynexport.runtime.engines.tensorrt import opening
from dynexport.runtime.engines.tensorrt.backend import Backend

__all__ = ["engines"]  # a fixture
pytestmark = needs_standins


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        trt = install(patch).trt
        patch.setattr(opening, "find_gpu", lambda: HERE)
        patch.setattr(opening, "open_backend", lambda name: Backend(name, trt, VERSION, ()))
        patch.setenv("DYNEXPORT_CPP", str(BUILD))
        patch.setenv("DYNEXPORT_ONNXRUNTIME", str(LIBRARY))
        patch.setenv("LD_LIBRARY_PATH", str(STANDIN))
        patch.setattr(gpu_check_cpp, "_PROMPT", 12)
        patch.setattr(gpu_check_cpp, "_STEPS", 6)
        yield


def check(bundle: Path) -> Check:
    return Check("C++", Engines("tensorrt", bundle, bundle, {}).in_cpp)


@pytest.mark.parametrize("case", ["dense", "skip-2x", "mod-router", "radial-step"])
def test_the_same_tokens(case: str, engines: Callable[[str], Path]) -> None:
    outcome = check(engines(case)).outcome()
    assert (outcome.state, outcome.found) == ("passed", "7 greedy tokens as from Python")


def test_other_tokens_and_failures(engines: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = gpu_check_cpp._greedy
    monkeypatch.setattr(gpu_check_cpp, "_greedy", lambda *told: [*greedy(*told)[:3], -1, *greedy(*told)[4:]])
    outcome = check(engines("dense")).outcome()
    assert outcome.state == "failed" and "token 3 after the prompt: expected -1 as from Python, found " in outcome.found
    for settings, state, expected in (
        ({"fails": "no kernel"}, "failed", "TensorRT failed in a step: no kernel"),
        ({"version": 110400}, "skipped", "probe_tensorrt exited with 2: tensorrt: expected version 10.14"),
        ({"devices": 0}, "failed", "probe_tensorrt exited with 2: --backend tensorrt: expected a GPU, found none"),
    ):
        monkeypatch.setenv("DYNEXPORT_STANDIN", json.dumps(settings))
        outcome = check(engines("dense")).outcome()
        assert outcome.state == state and expected in outcome.found


def test_what_is_not_built_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there are no engines" in check(tmp_path / "none").outcome().found
    monkeypatch.setenv("DYNEXPORT_CPP", str(tmp_path))
    outcome = check(tmp_path).outcome()
    assert outcome.state == "skipped" and f"{tmp_path / 'probe_tensorrt'} is missing: run make cpp" in outcome.found
