"""``dynexport gpu-check``: without a GPU, and on stand-ins of one that compute."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from bundles import CONFORMANCE, dynexport, error_of

from dynexport.exporter.cli import gpu_check as command
from dynexport.exporter.cli import gpu_checks
from dynexport.exporter.cli.gpu_checks import SAMPLES, Check, Engines, Skipped, checks
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph

sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
from on_fake_gpu import ADA, Machine, install

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """With engines that are "built" for the stand-ins."""
    machine = install(monkeypatch)

    def build(bundle: Bundle, graph: Graph, *_: object, strip: bool, **__: object) -> None:
        machine.build(bundle, graph, strip=strip)

    monkeypatch.setattr(command, "find_gpu", lambda: ADA)
    monkeypatch.setattr(gpu_checks, "find_gpu", lambda: ADA)
    monkeypatch.setattr(gpu_checks, "open_backend", lambda name: SimpleNamespace(version="1", capabilities=("8.9",)))
    monkeypatch.setattr(gpu_checks, "build_engine", build)
    return machine


def test_no_gpu() -> None:
    ran = dynexport("gpu-check", "--json", "-")
    if ran.report["gpu"] is not None:
        pytest.skip("there is a GPU")
    (line,) = ran.err.splitlines()
    assert ran.code == 1 and line.startswith("FAILED: expected a GPU, found none (") and "kernels of plugins" in line
    assert len(ran.report["unchecked"]) == len(set(ran.report["unchecked"])) > len(SAMPLES)


def test_samples_that_are_not_there(machine: Machine, tmp_path: Path) -> None:
    line = error_of(dynexport("gpu-check", "--samples", tmp_path))
    assert "expected a checkpoint dense, found none; name their directory with --samples" in line


def test_every_outcome_is_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def skipped() -> str:
        raise Skipped("it is not installed")

    def failed() -> str:
        raise DynexportError("expected 1, found 2")

    def broken() -> str:
        raise RuntimeError("no\nkernel")

    made = [Check("good", lambda: "all of it"), Check("away", skipped), Check("bad", failed), Check("odd", broken)]
    monkeypatch.setattr(gpu_checks, "checks", lambda *_, **__: made)
    ran = dynexport("gpu-check", "--samples", ROOT / "samples" / "training" / "checkpoints", "--json", "-")
    told = {outcome["name"]: (outcome["state"], outcome["found"]) for outcome in ran.report["outcomes"]}
    assert told == {
        "good": ("passed", "all of it"),
        "away": ("skipped", "it is not installed"),
        "bad": ("failed", "expected 1, found 2"),
        "odd": ("failed", "RuntimeError: no kernel"),
    }
    assert ran.code == 1 and "FAILED: 1 passed, 2 failed, 1 skipped" in ran.err
    monkeypatch.setattr(gpu_checks, "checks", lambda *_, **__: made[:2])
    ran = dynexport("gpu-check", "--samples", ROOT / "samples" / "training" / "checkpoints")
    assert ran.code == 0 and "passed: 1 passed, 0 failed, 1 skipped" in ran.out


def test_engines_are_built_verified_and_measured(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(gpu_checks, "_CONTEXT", 64)
    monkeypatch.setattr(gpu_checks, "_PROMPT", 9)
    monkeypatch.setattr(gpu_checks, "_NEW", 4)
    run = Engines("tensorrt-rtx", CONFORMANCE / "skip-2x", tmp_path / "bundle", {"precision": "fp32"})
    assert Check("bench", run.measured).outcome().state == "skipped"
    verified, measured = Check("verify", run.verified).outcome(), Check("bench", run.measured).outcome()
    assert verified.state == "passed" and "engines for 8.9 in " in verified.found, verified
    assert "checks against PyTorch" in verified.found
    assert measured.state == "passed" and "a step at full depth " in measured.found and "efficiency" in measured.found
    Bundle.open(tmp_path / "bundle")
    assert machine.trt.refitted == []
    options = {"precision": "fp32"}
    stripped = Engines("tensorrt-rtx", CONFORMANCE / "skip-2x", tmp_path / "stripped", options, strip=True)
    outcome = Check("without weights", stripped.verified).outcome()
    assert outcome.state == "passed" and machine.trt.refitted, outcome
    machine.trt.fails = "no kernel"
    assert "TensorRT failed in a step: no kernel" in Check("bench", run.measured).outcome().found


@pytest.mark.parametrize(
    ("code", "said", "state"),
    [(0, "30 passed, 9 deselected", "passed"), (0, "30 skipped", "skipped"), (1, "1 failed, 29 passed", "failed")],
)
def test_what_pytest_says_of_kernels(code: int, said: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = SimpleNamespace(returncode=code, stdout=f"..\n{said} in 2.00s\n", stderr="")
    monkeypatch.setattr(gpu_checks, "subprocess", SimpleNamespace(run=lambda *_, **__: done))
    outcome = Check("kernels", gpu_checks.kernels).outcome()
    assert (outcome.state, outcome.found) == (state, f"{said} in 2.00s")


def test_what_is_not_there_is_skipped(tmp_path: Path) -> None:
    """Whatever is here of these: none of them fails for want of a package."""
    found = {check.name: check for check in checks(tmp_path, tmp_path, benchmarks=True)}
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        outcome = found["torch, eager: dense"].outcome()
        assert outcome.state == "skipped" and "has no CUDA" in outcome.found
    outcome = found["onnxruntime-cuda: dense: verify"].outcome()
    assert outcome.state == "skipped" and "expected CUDAExecutionProvider" in outcome.found
    assert json.dumps(outcome.model_dump())
