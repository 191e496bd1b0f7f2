"""A Radial Network's decode step in one graph by the CPU operators: with the library, and by their bodies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bundles import CONFORMANCE, dynexport, error_of
from radial_steps import assert_an_ended_row_is_not_in_the_way, assert_same_as_by_the_set
from tiny_models import EXEMPLARS, LAYERS, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.plugins.cpu_library import VARIABLE
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import WEIGHTS
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.graph_set import RunningSet
from dynexport.runtime.execution.whole_step import WholeStep

ModelOf = Callable[[str], Path]
# float32 on both sides, added up in another order; a path may differ where two choices are closer than that.
TOLERANCE, MARGIN = 1e-4, 1e-5
CONTEXT, HOPS = 40, 5
# Layers of one pool share a cache, so that one window has to serve all.
POOLED = [family for family in EXEMPLARS if family != "gemma2"]


@pytest.fixture(params=[True, False], ids=["library", "bodies"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if not request.param:
        monkeypatch.setenv(VARIABLE, "")
    return bool(request.param)


def opened(model: Path, bundle: Path, **options: Any) -> Executor:
    convert(model, bundle, golden=False, **{"plugins": True, "max_length": CONTEXT, **options})
    return Executor(Bundle.open(bundle), 2)


@pytest.mark.parametrize("family", POOLED)
def test_paths_and_logits(family: str, library: bool, saved_model: ModelOf, tmp_path: Path) -> None:
    """Prompts by the set, steps by the graph, a row that has ended, and a second turn, against PyTorch.

    Every second family with gates, without reuse and with hops in which none may leave.
    """
    more = {"gate": "probability", "allow_reuse": False, "min_steps": 2, "max_steps": LAYERS + 1}
    fields = more if POOLED.index(family) % 2 else {}
    model = save_radial_model(tmp_path / "model", saved_model(family), **fields)
    executor = opened(model, tmp_path / "bundle")
    contract = executor.manifest.contract
    assert isinstance(contract, Radial) and isinstance(executor.program("decode", executor.manifest.full), WholeStep)
    rows, later = random_rows(1, 5, 17), random_rows(4, 2, 3, seed=9)
    cache = executor.full_cache(3, CONTEXT, record=True)
    found = [[logits] for logits in executor.prefill(cache, rows, all_logits=True)]
    live = np.array([True, True, True])
    for tokens in random_rows(3, 3, 3, seed=8):
        logits = executor.step(cache, tokens, executor.manifest.full, live)
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


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_precisions_against_the_set(
    precision: str, library: bool, saved_model: ModelOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph and the set read the same stored weights: the step's logits are those of the prompt's last token."""
    model = save_radial_model(tmp_path / "model", saved_model("bloom"), gate="probability")
    executor = opened(model, tmp_path / "bundle", precision=precision)
    random = np.random.default_rng(2)
    forced = random.integers(0, LAYERS, (HOPS, 8))
    forced[3:, 7] = LAYERS
    (row,) = random_rows(8)
    whole, stepped = executor.full_cache(1, CONTEXT), executor.full_cache(1, CONTEXT)
    (expected,) = executor.prefill(whole, [row], forced=[forced])
    executor.prefill(stepped, [row[:7]], forced=[forced[:, :7]])
    found = executor.step(stepped, [row[7]], executor.manifest.full, forced=forced[:, 7:])
    assert (whole.lengths == stepped.lengths).all()
    assert np.abs(found - expected).max() < 0.02 * expected.std()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Executor, Executor]:
    """A model with a router for every hop and gates: as a set, and with the graph that decodes."""
    home, fields = tmp_path_factory.mktemp("both"), {"cache_policy": "step", "max_steps": HOPS}
    executors = [
        opened(CONFORMANCE / "radial-own-routers", home / str(plugins), fields=fields, plugins=plugins)
        for plugins in (False, True)
    ]
    return executors[0], executors[1]


def test_the_same_as_by_the_set(both: tuple[Executor, Executor]) -> None:
    assert_same_as_by_the_set(both, HOPS)


def test_a_row_that_has_ended_is_not_in_the_way(both: tuple[Executor, Executor]) -> None:
    assert_an_ended_row_is_not_in_the_way(both[1], CONTEXT)


def test_every_weight_lies_in_the_bundle_once(
    both: tuple[Executor, Executor], saved_model: ModelOf, tmp_path: Path
) -> None:
    """The set's layers within the stacks of the graph that decodes, and nothing twice; also with several parts."""
    model = save_radial_model(tmp_path / "model", saved_model("bloom"))
    blocks = opened(model, tmp_path / "b", precision="int4").bundle
    for bundle in (both[1].bundle, blocks):
        places = places_in(bundle.path)
        layers = bundle.manifest.model.layers
        stacks = {name: span for name, span in places.items() if ".pool." in name}
        assert stacks
        for name, (offset, length) in stacks.items():
            single = [places[name.replace(".pool.", f".{i}.")] for i in range(layers)]
            assert [start for start, _ in single] == [offset + i * size for i, (_, size) in enumerate(single)]
            assert sum(size for _, size in single) == length
        spans = sorted(span for name, span in places.items() if ".pool." not in name)
        assert all(start + size <= after for (start, size), (after, _) in pairwise(spans))
        assert spans[-1][0] + spans[-1][1] <= (bundle.path / WEIGHTS).stat().st_size
    assert both[0].manifest.cost == both[1].manifest.cost
    assert both[0].manifest.model.parameters == both[1].manifest.model.parameters


def places_in(bundle: Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of all graphs, also of branches, lie: offset and length by name."""
    found = {}
    for path in bundle.glob("*.onnx"):
        pending = [onnx.load(path, load_external_data=False).graph]
        while pending:
            graph = pending.pop()
            pending += [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            for tensor in graph.initializer:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                if entries:
                    found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_the_graph(both: tuple[Executor, Executor]) -> None:
    """A condition and a decision for every hop; the matrices of layers are read by our operators alone."""
    graph = ir.load(both[1].bundle.path / "decode.onnx").graph
    kinds = [node.op_type for node in graph.all_nodes()]
    assert [kinds.count(kind) for kind in ("If", "ChooseLayer", "CachedAttention")] == [HOPS] * 3
    for name, value in graph.initializers.items():
        if name.startswith("model.layers.pool.") and value.shape is not None:
            readers = {node.op_type for node, _ in value.uses()}
            assert readers <= {"SelectedFloatMatMul", "SelectedNorm", "SelectedAddNorm"}, name


def test_caches_of_layers_go_hop_by_hop(tmp_path: Path) -> None:
    executor = opened(CONFORMANCE / "radial-layer", tmp_path / "b", max_length=None)
    assert isinstance(executor.program("decode", executor.manifest.full), RunningSet)


def test_broken_blocks_are_refused(saved_model: ModelOf, tmp_path: Path) -> None:
    model = save_radial_model(tmp_path / "model", saved_model("llama"))
    message = error_of(dynexport("convert", model, "-o", tmp_path / "b", "--plugins", "--precision", "int4"))
    assert "expected matrices of whole blocks for radial with precision int4" in message
