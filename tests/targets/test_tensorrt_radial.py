"""Radial Networks for TensorRT: the graph set and the single graph on ONNX Runtime, their types, and their engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from bundles import CONFORMANCE, dynexport, error_of
from rtx_builds import built, report
from test_tensorrt_structure import CAPABILITIES
from tiny_models import EXEMPLARS, LAYERS, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.lowering.tensorrt.rules import check_accepted
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.execution.executor import Executor

ModelOf = Callable[[str], Path]
# float32 on both sides, added up in another order; a path may differ where two choices are closer than that.
TOLERANCE, MARGIN = 1e-4, 1e-5
CONTEXT, STEPS = 40, 5
# Layers of one pool share a cache, so that one window has to serve all.
POOLED = [family for family in EXEMPLARS if family != "gemma2"]
# Largest error of logits in standard deviations, on forced paths; of random models 4 bits leave little.
PRECISIONS = {"fp16": 0.05, "int8": 0.6, "int4": 8.0}


def opened(model: Path, bundle: Path, **options: Any) -> Executor:
    convert(model, bundle, target="tensorrt", max_length=CONTEXT, golden=False, **options)
    return Executor(Bundle.open(bundle), 1)


def check_against_reference(executor: Executor, model: Path) -> None:
    """Prompts of lengths never used to build, as a batch, steps of it with a row that has ended, and a second turn."""
    contract = executor.manifest.contract
    assert isinstance(contract, Radial)
    rows, later = random_rows(1, 5, 17), random_rows(4, 2, 3, seed=9)
    cache = executor.full_cache(3, CONTEXT, record=True)
    found = [[logits] for logits in executor.prefill(cache, rows, all_logits=True)]
    live = np.array([True, True, True])
    for tokens in random_rows(3, 3, 3, seed=8):
        logits = executor.step(cache, tokens, executor.bundle.depth(1), live)
        for row in np.flatnonzero(live):
            found[row].append(logits[row][None])
            rows[row] = [*rows[row], tokens[row]]
        live[1] = False
    for row, logits in enumerate(executor.prefill(cache, later, chunk=3, all_logits=True)):
        found[row].append(logits)
        rows[row] = [*rows[row], *later[row]]
    reference = RadialReference.from_checkpoint(open_checkpoint(model), contract=contract)
    expected, paths = reference.routed_logits(rows)
    for row, (logits, path) in enumerate(zip(expected, paths, strict=True)):
        ours = executor.reader.joined(cache.logs[row]).choices
        assert ((ours == path.path).all(axis=0) | (path.margin.min(axis=0) < MARGIN)).all()
        assert np.abs(np.concatenate(found[row]) - logits).max() < TOLERANCE * max(1, logits.std(axis=-1).mean())
    assert len({tuple(column) for path in paths for column in path.path.T}) > 1


@pytest.mark.parametrize("policy", ["step", "layer"])
@pytest.mark.parametrize("family", POOLED)
def test_paths_and_logits(family: str, policy: str, saved_model: ModelOf, tmp_path: Path) -> None:
    gate = "probability" if policy == "layer" else "none"
    model = save_radial_model(tmp_path / "model", saved_model(family), cache_policy=policy, gate=gate)
    check_against_reference(opened(model, tmp_path / "bundle"), model)


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_the_single_graph(family: str, saved_model: ModelOf, tmp_path: Path) -> None:
    fields = {"max_steps": 2, "allow_reuse": False, "gate": "probability"}
    model = save_radial_model(tmp_path / "model", saved_model(family), **fields)
    check_against_reference(opened(model, tmp_path / "bundle", layer_capacity=1.0), model)


def test_the_single_graph_of_layer_caches(saved_model: ModelOf, tmp_path: Path) -> None:
    """Every step appends to them: by our operator, for tokens that run."""
    model = save_radial_model(tmp_path / "model", saved_model("mistral"), cache_policy="layer", max_steps=3)
    check_against_reference(opened(model, tmp_path / "bundle", layer_capacity=1.0, plugins=True), model)
    graph = ir.load(tmp_path / "bundle" / "model.onnx").graph
    called = [node.op_type for node in graph]
    assert called.count("RaggedKVAppend") == 2 * LAYERS * 3 and "TensorScatter" not in called


@pytest.mark.parametrize("policy", ["step", "layer"])
def test_slots_that_no_entry_has_filled_are_hidden(policy: str, saved_model: ModelOf, tmp_path: Path) -> None:
    """What an earlier sequence left in a cache, tags and positions too, changes nothing: the graph sees all slots."""
    model = save_radial_model(tmp_path / "model", saved_model("mistral"), cache_policy=policy)
    executor = opened(model, tmp_path / "bundle")
    prompt, found = random_rows(9), []
    for rubbish in (0, 3):
        cache = executor.full_cache(1, CONTEXT)
        for buffer in cache.buffers.values():
            buffer[:] = rubbish
        (logits,) = executor.prefill(cache, prompt, all_logits=True)
        found.append([*logits, *executor.step(cache, [5], executor.bundle.depth(1))])
    assert (np.array(found[0]) == np.array(found[1])).all()


def test_a_layer_that_is_come_back_to_has_room(saved_model: ModelOf, tmp_path: Path) -> None:
    """Every token in one layer at every step, to the end of the context: as many slots as tokens times steps."""
    model = save_radial_model(tmp_path / "model", saved_model("llama"), cache_policy="layer")
    executor = opened(model, tmp_path / "bundle")
    contract, (row,) = executor.manifest.contract, random_rows(CONTEXT)
    assert isinstance(contract, Radial)
    cache, path = executor.full_cache(1, CONTEXT), np.full((STEPS, CONTEXT), 2)
    assert cache.buffers["2.key"].shape[2] == STEPS * CONTEXT
    (logits,) = executor.prefill(cache, [row], all_logits=True, forced=[path])
    assert cache.lengths[2, 0] == cache.buffers["2.key"].shape[2]
    reference = RadialReference.from_checkpoint(open_checkpoint(model), contract=contract)
    (expected,), _ = reference.routed_logits([row], [path])
    assert np.abs(logits - expected).max() < TOLERANCE


@pytest.mark.parametrize("policy", ["step", "layer"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_precisions(family: str, policy: str, saved_model: ModelOf, tmp_path: Path) -> None:
    """Choices are those of fp32 where rounding leaves them; so paths are forced."""
    model = save_radial_model(tmp_path / "model", saved_model(family), cache_policy=policy, gate="probability")
    random, found = np.random.default_rng(2), {}
    prompts, last = random_rows(3, 7, 12), random.integers(0, LAYERS, (STEPS, 3))
    forced = [random.integers(0, LAYERS, (STEPS, len(prompt))) for prompt in prompts]
    for precision in ("fp32", *PRECISIONS):
        executor = opened(model, tmp_path / precision, precision=precision)
        cache = executor.full_cache(3, CONTEXT)
        assert cache.buffers["0.key"].dtype == (np.float32 if precision == "fp32" else np.float16)
        logits = executor.prefill(cache, prompts, all_logits=True, forced=forced)
        found[precision] = np.concatenate(
            [*logits, executor.step(cache, [1, 2, 3], executor.bundle.depth(1), forced=last)]
        )
        assert found[precision].dtype == np.float32
    for precision, most in PRECISIONS.items():
        error = np.abs(found[precision] - found["fp32"]).max() / found["fp32"].std()
        assert error < most, (precision, error)


def test_types_and_profiles(tmp_path: Path) -> None:
    """Floats between graphs are float16; scores, margins, probabilities, gates and angles float32, and so are routers
    from their first operator on."""
    sizes = {"max_batch": 3, "max_prompt": 20}
    done = convert(
        CONFORMANCE / "radial-gated-noexit", tmp_path / "b", target="tensorrt", precision="fp16", golden=False, **sizes
    )
    wide = {"cos", "sin", "scores", "margins", "probabilities", "gates", "logits"}
    for graph in done.manifest.graphs:
        for spec in (*graph.inputs, *graph.outputs):
            assert spec.dtype in ("int64", "bool") or (spec.dtype == "float") == (spec.name in wide), spec
        model = ir.load(tmp_path / "b" / graph.file)
        check_accepted(model.graph)
        assert set(model.graph.opset_imports) == {""}
    router = ir.load(tmp_path / "b" / "router.onnx").graph
    casts = [node for node in router if node.op_type == "Cast"]
    assert [node.inputs[0] for node in casts] == [router.inputs[0]]
    assert casts[0].attributes["to"].as_int() == ir.DataType.FLOAT
    one, rows = (1, 1, 1), (1, 1, 3)
    found = done.manifest.program("prompt", done.manifest.full).set
    parts = {"embedding": found.embedding, "router": found.routers[0], "attention": found.attention, "head": found.head}
    parts |= {"before_attention": found.before_attention[0], "after_attention": found.after_attention[0]}
    ranges = {part: [p.ranges for p in done.manifest.graph(name).profiles] for part, name in parts.items()}
    on_tokens = [{"N": (1, 20, 60)}, {"N": rows}]
    assert ranges == dict.fromkeys(("embedding", "router", "before_attention", "after_attention"), on_tokens) | {
        "attention": [{"B": rows, "C": (1, 20, 20)}, {"B": rows, "C": one}],
        "head": [{"N": (1, 1, 16)}, {"N": rows}],
    }


REFUSED: dict[str, tuple[str, list[object], str]] = {
    "layer caches in one graph": (
        "radial-layer",
        ["--single-graph"],
        "expected cache_policy step .*found layer.*--plugins",
    ),
    "room for some, in batches": (
        "radial-step",
        ["--single-graph", "--layer-capacity", 0.5],
        "expected 1 for batches.*found 0.5; give --max-batch 1",
    ),
    "long prompts": ("radial-step", ["--max-prompt", 5000], "max_prompt: expected 1"),
    "static": ("radial-step", ["--static"], "for a static graph of radial give --single-graph"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    source, options, expected = REFUSED[case]
    command = ("convert", CONFORMANCE / source, "--target", "tensorrt", *options, "-o", tmp_path / "bundle")
    message = error_of(dynexport(*command))
    assert re.search(expected, message) and not (tmp_path / "bundle").exists()


def test_a_pool_of_differing_windows_is_refused(saved_model: ModelOf, tmp_path: Path) -> None:
    model = save_radial_model(tmp_path / "model", saved_model("gemma2"))
    message = error_of(dynexport("convert", model, "--target", "tensorrt", "-o", tmp_path / "bundle"))
    assert "radial: expected a pool of layers with one sliding window, found gemma2" in message


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        ("radial-step", "fp16"),
        ("radial-layer", "fp16"),
        ("radial-gated-noexit", "fp32"),
        ("radial-layer", "bf16"),
        ("radial-noreuse-min", "int8"),
        ("radial-step", "int4"),
    ],
)
def test_engines_are_built_on_a_machine_without_a_gpu(case: str, precision: Any, tmp_path: Path) -> None:
    """For compute capabilities 8.0, 8.9 and 12.0 at once; of other layers than the first the graphs are the same."""
    rtx = pytest.importorskip("tensorrt_rtx")
    bundle = tmp_path / "bundle"
    done = convert(CONFORMANCE / case, bundle, target="tensorrt", precision=precision, max_prompt=16, golden=False)
    for graph in done.manifest.graphs:
        if graph.layers in ((), (0,)):
            assert built(rtx, bundle / graph.file, graph, CAPABILITIES)[1] > 0, graph.name


def test_an_engine_of_the_single_graph(tmp_path: Path) -> None:
    """A step of it; with room for half of the tokens, which TensorRT builds of one row only."""
    rtx = pytest.importorskip("tensorrt_rtx")
    sizes = {"max_batch": 1, "max_prompt": 16, "max_length": 32, "fields": {"max_steps": 1}}
    done = convert(
        CONFORMANCE / "radial-step", tmp_path / "b", target="tensorrt", precision="fp16", layer_capacity=0.5,
        golden=False, **sizes,
    )  # fmt: skip
    (graph,) = done.manifest.graphs
    assert built(rtx, tmp_path / "b" / graph.file, graph, CAPABILITIES)[1] > 0


def test_an_engine_of_the_single_graph_of_layer_caches(tmp_path: Path) -> None:
    """Two steps: each appends keys and values to the caches of all layers."""
    pytest.importorskip("tensorrt_rtx")
    sizes = {"max_batch": 2, "max_prompt": 16, "max_length": 32, "fields": {"max_steps": 2}}
    options = {"target": "tensorrt", "precision": "fp16", "layer_capacity": 1.0, "plugins": True, "golden": False}
    done = convert(CONFORMANCE / "radial-layer", tmp_path / "b", **options, **sizes)
    found = report(tmp_path / "b", "model", "--plugins")
    assert (found.get("plugins"), "error" in found) == (2 * 2 * done.manifest.model.layers, False), found
