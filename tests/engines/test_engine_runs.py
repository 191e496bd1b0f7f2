"""Executors on TensorRT engines: the same as on ONNX Runtime, in a device's memory. Both are stand-ins (fake_gpu)."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, dynexport, error_of, replace_file
from fake_gpu import NO_MEMORY
from on_fake_gpu import CASES, CONTEXT, ROWS, Machine, convert_case, install
from tiny_models import random_rows

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import PAST
from dynexport.runtime.engines.registry import open_backend
from dynexport.runtime.engines.tensorrt import kernels, opening
from dynexport.runtime.engines.tensorrt.gpu import NoGpu
from dynexport.runtime.engines.tensorrt.plugins import our_plugins
from dynexport.runtime.execution.executor import Executor

Array = np.ndarray
BACKEND: Any = "tensorrt-rtx"


@pytest.fixture
def machine() -> Iterator[Machine]:
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A bundle for TensorRT."""

    @cache
    def make(case: str) -> Path:
        bundle = tmp_path_factory.mktemp(case) / "bundle"
        convert_case(case, bundle)
        return bundle

    return make


def talk(executor: Executor, lengths: tuple[int, ...]) -> list[Array]:
    """Prompts in a batch, three tokens fed one by one, further prompts row by row: all their logits."""
    vocabulary = executor.manifest.model.vocab_size
    first, second = (
        [[token % vocabulary for token in row] for row in random_rows(*sizes, seed=seed)]
        for seed, sizes in ((1, lengths), (2, [5] * len(lengths)))
    )
    state = executor.full_cache(len(lengths), CONTEXT)
    found = list(executor.prefill(state, first, all_logits=True))
    for speedup in (executor.bundle.depth(None), executor.bundle.depth(None), executor.bundle.depth(1)):
        found.append(executor.step(state, found[-1][-1:].argmax(-1).repeat(len(lengths)), speedup))
    return found + list(executor.prefill(state, second, all_logits=True))


def same(found: list[Array], expected: list[Array]) -> None:
    for own, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5, atol=1e-5)
        assert (own.argmax(-1) == other.argmax(-1)).all()


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_on_onnxruntime(case: str, converted: Callable[[str], Path], machine: Machine) -> None:
    """At batches and lengths that no profile names as its usual ones; and nothing is left of it afterwards."""
    bundle = machine.built(converted(case))
    engines, expected = Executor(bundle, 1, backend=BACKEND), Executor(bundle, 1)
    for lengths in ((3, 8, 1), (17,), (2, 2, 5, 7)):
        same(talk(engines, lengths), talk(expected, lengths))
    assert {path.name for path in machine.trt.read} == {graph.file for graph in bundle.manifest.graphs}
    assert machine.cuda.calls["cudaGraphLaunch"] > 0
    del engines
    gc.collect()
    assert (machine.cuda.used, machine.cuda.graphs, machine.cuda.captured) == (0, {}, {})


def test_nothing_waits_for_the_garbage_collector(converted: Callable[[str], Path], machine: Machine) -> None:
    """The memory of a step that gives way to another is free at once; an engine holds its last cache."""
    executor = Executor(machine.built(converted("dense")), 1, backend=BACKEND)
    gc.disable()
    try:
        used = []
        for _ in range(4):
            talk(executor, (3, 4))
            used.append(machine.cuda.used)
        assert len(set(used)) == 1
        del executor
        assert (machine.cuda.used, machine.cuda.graphs) == (0, {})
    finally:
        gc.enable()


def test_a_row_is_a_part_of_its_batch(converted: Callable[[str], Path], machine: Machine) -> None:
    """Rows that are prompted one by one are there in the step of all of them; the host's memory is never touched."""
    bundle = machine.built(converted("dense"))
    found, touched = [], []
    for executor in (Executor(bundle, 1, backend=BACKEND), Executor(bundle, 1)):
        state = executor.full_cache(3, CONTEXT)
        executor.step(state, [1, 2, 3], bundle.depth(1))  # from now on row by row
        executor.prefill(state, [[4, 5], [6], [7, 8, 9]])
        found.append(executor.step(state, [1, 2, 3], bundle.depth(1)))
        touched.append(bool(state.buffers["0.key"].any()))
    same(found[:1], found[1:])
    assert touched == [False, True]


def test_a_cuda_graph_takes_new_values_and_another_cache(converted: Callable[[str], Path], machine: Machine) -> None:
    bundle = machine.built(converted("dense"))
    engines, expected = Executor(bundle, 1, backend=BACKEND), Executor(bundle, 1)
    captures = []
    for rows in (2, 2, 3):
        states = [executor.full_cache(rows, CONTEXT) for executor in (engines, expected)]
        for token in range(4):
            tokens = np.arange(rows) + token
            steps = zip((engines, expected), states, strict=True)
            same(*[[executor.step(state, tokens, bundle.depth(1))] for executor, state in steps])
        captures.append(machine.cuda.calls["cudaStreamBeginCapture"])
    assert captures == [1, 2, 3]  # one a cache
    assert machine.cuda.calls["cudaGraphLaunch"] == 9 and len(machine.cuda.graphs) == 1


def test_a_step_that_cannot_be_captured(converted: Callable[[str], Path], machine: Machine) -> None:
    """It runs as it is, and is not tried again."""
    bundle = machine.built(converted("dense"))
    expected = talk(Executor(bundle, 1), (2, 3))
    for change in (
        lambda: setattr(machine.trt, "uncapturable", True),
        lambda: (setattr(machine.trt, "uncapturable", False), machine.cuda.errors.update(cudaGraphInstantiate=1)),
    ):
        change()
        machine.cuda.calls.clear()
        executor = Executor(bundle, 1, backend=BACKEND)
        same(talk(executor, (2, 3)), expected)
        assert machine.cuda.calls["cudaStreamBeginCapture"] == 1 and "cudaGraphLaunch" not in machine.cuda.calls


def test_an_execution_that_fails(converted: Callable[[str], Path], machine: Machine) -> None:
    bundle = machine.built(converted("dense"))
    executor = Executor(bundle, 1, backend=BACKEND)
    state = executor.full_cache(1, CONTEXT)
    machine.trt.fails = "IExecutionContext::enqueueV3: Error Code 1: Cask (no kernel)"
    with pytest.raises(DynexportError, match=r"^graph model: TensorRT failed in a step: Cask \(no kernel\)$"):
        executor.step(state, [1], bundle.depth(1))
    machine.trt.fails = None
    for code, expected in ((1, "cudaMemcpyAsync: CUDA error 1: invalid argument"), (NO_MEMORY, "not enough memory")):
        machine.cuda.errors["cudaMemcpyAsync"] = code
        with pytest.raises(DynexportError, match=expected):
            executor.step(state, [1], bundle.depth(1))
    machine.cuda.errors.clear()
    expected_logits = Executor(bundle, 1)
    same(
        [executor.step(state, [1], bundle.depth(1))],
        [expected_logits.step(expected_logits.full_cache(1, CONTEXT), [1], bundle.depth(1))],
    )


def test_too_little_memory(converted: Callable[[str], Path], machine: Machine) -> None:
    """The step before it still runs, with a cache of its own."""
    bundle = machine.built(converted("dense"))
    executor = Executor(bundle, 1, backend=BACKEND)
    small, large = executor.full_cache(1, CONTEXT), executor.full_cache(ROWS, CONTEXT)
    logits = executor.step(small, [1], bundle.depth(1))
    machine.cuda.size = machine.cuda.used + 5_000
    with pytest.raises(DynexportError, match="the GPU has not enough memory; lower the batch, or convert with a small"):
        executor.step(large, [1, 1, 1, 1], bundle.depth(1))
    small.rewind(0)
    same([executor.step(small, [1], bundle.depth(1))], [logits])


def test_sizes_that_no_profile_has_room_for(converted: Callable[[str], Path], machine: Machine) -> None:
    bundle = machine.built(converted("dense"))
    executor = Executor(bundle, 1, backend=BACKEND)
    with pytest.raises(DynexportError, match=f"batch: expected at most {ROWS} rows.*found 5"):
        executor.full_cache(5, CONTEXT)
    (graph,) = bundle.manifest.graphs
    engine = open_backend(bundle, BACKEND).open(graph)
    sizes = {"B": 1, "S": 10, "K": 1}
    inputs = {s.name: np.zeros(s.sized(sizes), s.array_type) for s in graph.inputs if not s.name.startswith(PAST)}
    with pytest.raises(DynexportError, match=r"graph model: S: expected 1 to 9, which profile prefill was .* found 10"):
        engine.run(inputs)


# Engines without weights


def stripped(bundle: Path, copy: Path, machine: Machine) -> Bundle:
    """A copy of a bundle whose only engines lack their weights."""
    shutil.copytree(bundle, copy, ignore=shutil.ignore_patterns("engines"))
    return machine.built(copy, strip=True)


@pytest.mark.parametrize("case", ["dense", "skip-2x"])
def test_weights_of_the_bundle(case: str, converted: Callable[[str], Path], tmp_path: Path, machine: Machine) -> None:
    bundle = stripped(converted(case), tmp_path / "bundle", machine)
    same(talk(Executor(bundle, 1, backend=BACKEND), (3, 4)), talk(Executor(bundle, 1), (3, 4)))
    assert sorted(machine.trt.refitted) == sorted(bundle.path / graph.file for graph in bundle.manifest.graphs)
    machine.trt.refitted.clear()
    machine.built(bundle.path)  # beside them, engines with weights: those are taken
    talk(Executor(bundle, 1, backend=BACKEND), (3, 4))
    assert machine.trt.refitted == []


def test_weights_that_do_not_fit(converted: Callable[[str], Path], tmp_path: Path, machine: Machine) -> None:
    """What TensorRT says; weights that the engine was not built from never come to it."""
    bundle = stripped(converted("dense"), tmp_path / "bundle", machine)
    start = f"graph model: TensorRT cannot give its engine the weights of {bundle.path / 'model.onnx'}: "
    for field, said in (("unreadable", "no such initializer"), ("unfitting", "IRefitter::refit: Error Code 3: short")):
        setattr(machine.trt, field, said)
        line = error_of(dynexport("run", bundle.path, "--ids", "1,2", "--backend", "tensorrt-rtx"))
        reason = said.rsplit(": ")[-1]
        assert start in line
        assert line.endswith(f": {reason}; build one that has its own with: dynexport build, without --strip")
        setattr(machine.trt, field, None)
    read = len(machine.trt.read)
    replace_file(bundle.path, "model.data", (bundle.path / "model.data").read_bytes() + b"\0")
    line = error_of(dynexport("run", bundle.path, "--ids", "1,2", "--backend", "tensorrt-rtx"))
    assert "1 that cannot run here (built from weights " in line
    assert (len(machine.trt.read), machine.trt.refitted) == (read, [])


# What is refused before anything is deserialized


def test_an_engine_of_another_version(converted: Callable[[str], Path], tmp_path: Path, machine: Machine) -> None:
    path = tmp_path / "bundle"
    convert(CONFORMANCE / "dense", path, target="tensorrt", golden=False, max_length=32)
    machine.built(path, version="1.6.0.3")
    line = error_of(dynexport("run", path, "--ids", "1,2", "--backend", "tensorrt-rtx"))
    assert "1 that cannot run here (built by tensorrt-rtx 1.6.0.3, here is 1.7.1.116)" in line
    line = error_of(dynexport("run", path, "--ids", "1,2", "--backend", "tensorrt"))
    assert "1 that cannot run here (built by tensorrt-rtx, to be run by tensorrt); build one with: " in line
    bundle = machine.built(path)
    machine.trt.refuses = "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (stale)"
    with pytest.raises(DynexportError, match=r"graph model: TensorRT refuses its engine: API Usage Error \(stale\)"):
        Executor(bundle, backend=BACKEND).step(Executor(bundle).full_cache(1, 8), [1], bundle.depth(1))
    assert [path.name for path in machine.trt.read] == ["model.onnx"]


@pytest.mark.parametrize(
    "command", [("run", "--ids", "1"), ("verify",), ("bench", "--prompt-tokens", "4", "--new-tokens", "4")]
)
def test_a_machine_without_a_gpu(
    command: tuple[str, ...], converted: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "find_gpu", lambda: NoGpu("no driver"))
    monkeypatch.setattr(opening, "open_backend", lambda name: pytest.fail("it was loaded"))
    line = error_of(dynexport(command[0], converted("dense"), *command[1:], "--backend", "tensorrt"))
    assert "--backend tensorrt: expected a GPU, found none (no driver); --backend onnxruntime runs the same" in line


def test_a_bundle_for_onnxruntime(tmp_path: Path) -> None:
    convert(CONFORMANCE / "dense", tmp_path / "bundle", golden=False)
    line = error_of(dynexport("run", tmp_path / "bundle", "--ids", "1", "--backend", "tensorrt-rtx"))
    assert "expected a bundle for tensorrt, found one for onnxruntime; make one with: dynexport convert" in line
    line = error_of(dynexport("run", tmp_path / "bundle", "--ids", "1", "--backend", "onnxruntime-cuda"))
    assert "onnxruntime: expected CUDAExecutionProvider, found " in line and "install onnxruntime-gpu" in line


# Through the command line


def test_the_commands(converted: Callable[[str], Path], machine: Machine, tmp_path: Path) -> None:
    path = converted("skip-2x")
    machine.built(path)
    outs = []
    for backend in ("onnxruntime", "tensorrt-rtx"):
        ran = dynexport("run", path, "--ids", "1,2,3", "--max-new-tokens", "5", "--backend", backend, "--json", "-")
        assert ran.code == 0, ran.err
        outs.append(ran.report["ids"])
    assert outs[0] == outs[1]
    bench = ["--prompt-tokens", "9", "--new-tokens", "4", "--repeats", "2", "--backend", "tensorrt-rtx"]
    ran = dynexport("bench", path, *bench, "--json", "-")
    assert ran.code == 0, ran.err
    assert (ran.report["engine_share"], ran.report["operators"]) == (None, {})
    assert ran.report["engine"] == "tensorrt-rtx 1.7.1.116 on Ada card, compute capability 8.9, CUDA 13.0"
    assert "inside the engine" not in ran.err


# Plugins


def test_engines_with_our_plugins(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded with their kernels where a record asks for them; without kernels a line names the plugins."""
    path, ours = tmp_path / "bundle", our_plugins()
    convert(CONFORMANCE / "mod-topk", path, target="tensorrt", golden=False, max_length=32, plugins=True)
    bundle = machine.built(path, plugins=ours)
    loaded: list[Any] = []
    monkeypatch.setattr(opening, "load_with_kernels", loaded.append)
    Executor(bundle, backend=BACKEND)
    assert loaded == [machine.trt]
    monkeypatch.undo()
    install(monkeypatch)
    monkeypatch.setattr(kernels, "HOME", tmp_path / "home")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DynexportError, match=rf"plugins {ours.sha256[:12]}\.\., here are no kernels for them: nvcc is"):
        Executor(bundle, backend=BACKEND)
    assert not list((tmp_path / "home").iterdir())


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernels(output: Path) -> Path:
        output.write_bytes(b"fat")
        return output

    monkeypatch.setattr(kernels, "HOME", tmp_path / "home")
    monkeypatch.setattr("dynexport.plugins.kernels.compile_kernels", compile_kernels)
    path = kernels.compiled_kernels()
    monkeypatch.setattr("dynexport.plugins.kernels.compile_kernels", lambda output: pytest.fail("compiled again"))
    assert kernels.compiled_kernels() == path and path.read_bytes() == b"fat"
    assert list(path.parent.iterdir()) == [path]
