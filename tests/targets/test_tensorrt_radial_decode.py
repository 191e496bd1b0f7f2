"""A Radial Network's decode step in one graph, which takes the weights of chosen layers: on ONNX Runtime, by the bodies
of our operators, and as an engine by their plugins."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from bundles import CONFORMANCE, change_manifest, dynexport, error_of
from radial_steps import assert_an_ended_row_is_not_in_the_way, assert_same_as_by_the_set
from rtx_builds import report
from test_tensorrt_radial import CONTEXT, POOLED, STEPS, check_against_reference, opened
from tiny_models import LAYERS, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import read_architecture
from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.exporter.lowering.tensorrt.rules import check_accepted
from dynexport.exporter.strategies.radial.checks import check_decode_graph
from dynexport.plugins.schema import DOMAIN
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import WEIGHTS
from dynexport.runtime.execution.executor import Executor

ModelOf = Callable[[str], Path]
# Of a llama-like layer: query, key and value in one, then output, gate, up and down.
PRODUCTS = 5


@pytest.mark.parametrize("family", POOLED)
def test_paths_and_logits(family: str, saved_model: ModelOf, tmp_path: Path) -> None:
    """Every second family with gates, without reuse and with steps in which none may leave."""
    more = {"gate": "probability", "allow_reuse": False, "min_steps": 2, "max_steps": LAYERS + 1}
    fields = more if POOLED.index(family) % 2 else {}
    model = save_radial_model(tmp_path / "model", saved_model(family), **fields)
    check_against_reference(opened(model, tmp_path / "bundle", plugins=True), model)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Executor, Executor]:
    """A model with a router for every step and gates: as a set, and with the graph that decodes."""
    home, fields = tmp_path_factory.mktemp("both"), {"cache_policy": "step", "max_steps": STEPS}
    executors = []
    for name, plugins in (("set", False), ("decode", True)):
        options: dict[str, Any] = {"target": "tensorrt", "fields": fields, "max_length": CONTEXT, "plugins": plugins}
        convert(CONFORMANCE / "radial-own-routers", home / name, golden=False, **options)
        executors.append(Executor(Bundle.open(home / name), 1))
    return executors[0], executors[1]


def test_the_same_as_by_the_set(both: tuple[Executor, Executor]) -> None:
    assert_same_as_by_the_set(both, STEPS)


def test_a_row_that_has_ended_is_not_in_the_way(both: tuple[Executor, Executor]) -> None:
    cache, alone = assert_an_ended_row_is_not_in_the_way(both[1], CONTEXT)
    full = both[1].manifest.full
    with pytest.raises(DynexportError, match="the context is exhausted"):
        both[1].step(cache, [0, 1], full)
    with pytest.raises(DynexportError, match="forced path: hop 0: expected a layer"):
        both[1].step(alone, [0], full, forced=np.full((STEPS, 1), 99))


def test_half_precision(saved_model: ModelOf, tmp_path: Path) -> None:
    """ALiBi, biases and LayerNorm; on forced paths, as rounding may decide a near-tie."""
    model = save_radial_model(tmp_path / "model", saved_model("bloom"), gate="probability")
    random, found = np.random.default_rng(2), []
    prompts = random_rows(3, 7)
    paths = [random.integers(0, LAYERS, (STEPS, length)) for length in (3, 7)]
    for precision in ("fp32", "fp16"):
        executor = opened(model, tmp_path / precision, precision=precision, plugins=True)
        cache = executor.full_cache(2, CONTEXT)
        executor.prefill(cache, prompts, forced=paths)
        steps = [executor.step(cache, [1, 2], executor.bundle.depth(1), forced=paths[1][:, i : i + 2]) for i in (0, 2)]
        found.append(np.concatenate(steps))
    assert found[1].dtype == np.float32
    assert np.abs(found[1] - found[0]).max() / found[0].std() < 0.05


# The file of weights.


def places(bundle: Path) -> dict[str, tuple[int, int]]:
    """Where the tensors of all graphs lie: offset and length by name."""
    found = {}
    for path in bundle.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            if entries:
                found[tensor.name] = (int(entries["offset"]), int(entries["length"]))
    return found


def test_every_weight_lies_in_the_bundle_once(both: tuple[Executor, Executor]) -> None:
    """The set's layers within the stacks of the graph that decodes, and nothing twice."""
    alone, together = (executor.bundle for executor in both)
    apart, stacked = places(alone.path), places(together.path)
    assert {name for name in stacked if ".pool." not in name} == {*apart}
    contents = [(bundle.path / WEIGHTS).read_bytes() for bundle in (alone, together)]
    for name, (offset, length) in apart.items():
        start, size = stacked[name]
        assert contents[0][offset : offset + length] == contents[1][start : start + size], name
    for name, (offset, length) in stacked.items():
        if ".pool." in name:
            layers = [stacked[name.replace(".pool.", f".{i}.")] for i in range(alone.manifest.model.layers)]
            assert [start for start, _ in layers] == [offset + i * size for i, (_, size) in enumerate(layers)]
            assert sum(size for _, size in layers) == length
    spans = sorted(span for name, span in stacked.items() if ".pool." not in name)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    assert len(contents[1]) <= len(contents[0])
    assert together.manifest.cost == alone.manifest.cost
    assert together.manifest.model.parameters == alone.manifest.model.parameters


# The graph.


def decode_path(executor: Executor) -> Path:
    return executor.bundle.path / "decode.onnx"


def test_the_graph(both: tuple[Executor, Executor]) -> None:
    """All steps without conditions; matrices of layers are read by our operator alone."""
    graph = ir.load(decode_path(both[1])).graph
    check_accepted(graph)
    kinds = [node.op_type for node in graph.all_nodes()]
    assert not {*kinds} & {"If", "Loop", "Scan", "NonZero"}
    assert kinds.count("TensorScatter") == 2 * STEPS and kinds.count("SelectedMatMul") == PRODUCTS * STEPS
    for name, value in graph.initializers.items():
        if name.startswith("model.layers.pool.") and value.shape is not None:
            readers = {node.op_type for node, _ in value.uses()}
            assert readers == ({"SelectedMatMul"} if len(value.shape) == 3 else {"Gather"}), name
    entry = both[1].manifest.graph("decode")
    assert [(profile.name, profile.ranges) for profile in entry.profiles] == [("decode", {"B": (1, 1, 8)})]
    ran = dynexport("inspect", both[1].bundle.path, "--json", "-")
    assert ran.report["operators"]["decode"]["ours"] == {"SelectedMatMul": PRODUCTS * STEPS}


def test_a_token_that_has_left_takes_no_weights(both: tuple[Executor, Executor]) -> None:
    """It, and a row that has ended, have the index -1; the layer that was chosen stands for the others."""
    model, layers = onnx.load(decode_path(both[1])), both[1].manifest.model.layers
    index = list(dict.fromkeys(node.input[2] for node in model.graph.node if node.domain == DOMAIN))
    assert len(index) == STEPS
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, ["B"]) for name in index)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    forced = np.array([[0, 1, 0], [layers, 2, 1], [-1, 3, 2], [-1, 0, 0], [-1, layers, 0]])
    graph = both[1].manifest.graph("decode")
    inputs = {spec.name: np.zeros(spec.sized({"B": 3}), spec.array_type) for spec in graph.inputs}
    inputs |= {"forced_paths": forced[:, :, None], "token_counts": np.array([1, 1, 0])}
    found = np.stack(session.run(index, inputs))
    assert found.T.tolist() == [[0, -1, -1, -1, -1], [1, 2, 3, 0, -1], [-1] * STEPS]


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda graph: setattr(graph.inputs[0], "shape", ir.Shape(["B", "S"])), "input_ids: expected dimensions"),
        (lambda graph: setattr(graph[0], "op_type", "NonZero"), "depends on values"),
    ],
    ids=["more tokens", "a shape that depends on values"],
)
def test_a_spoiled_graph_is_refused(
    spoil: Callable[[Any], object], expected: str, both: tuple[Executor, Executor]
) -> None:
    graph = ir.load(decode_path(both[1])).graph
    contract = both[1].manifest.contract
    architecture = read_architecture(open_checkpoint(CONFORMANCE / "radial-own-routers").config)
    assert isinstance(contract, Radial)
    spoil(graph)
    with pytest.raises(BrokenGraph, match=expected):
        check_decode_graph(graph, architecture, contract)


REFUSED: dict[str, tuple[str, list[object], str]] = {
    "caches of layers": (
        "radial-layer",
        [],
        "expected cache_policy step .*found layer; leave out --plugins",
    ),
    "8 bits": ("radial-step", ["--precision", "int8"], "--plugins: expected precision fp32, fp16 or bf16 .*found int8"),
    "4 bits": ("radial-step", ["--precision", "int4"], "found int4; leave out --plugins"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused(case: str, tmp_path: Path) -> None:
    source, options, expected = REFUSED[case]
    command = ("convert", CONFORMANCE / source, "--target", "tensorrt", "--plugins", *options, "-o", tmp_path / "b")
    message = error_of(dynexport(*command))
    assert re.search(expected, message) and not (tmp_path / "b").exists()


def test_hostile_manifests(tmp_path: Path) -> None:
    convert(CONFORMANCE / "radial-step", tmp_path / "b", target="tensorrt", plugins=True, golden=False)
    change_manifest(tmp_path / "b", lambda fields: fields["graphs"][0]["outputs"].pop())
    with pytest.raises(DynexportError, match=r"decode\.onnx: expected an output path_margins, found none"):
        bundle = Bundle.open(tmp_path / "b")
        Executor(bundle, 1).program("decode", bundle.manifest.full)
    change_manifest(tmp_path / "b", lambda fields: fields["routing"].update(hops=2))
    with pytest.raises(DynexportError, match=r"programs: set: routers: expected 2 names, found 5|caches: expected one"):
        Bundle.open(tmp_path / "b")


def test_engines_are_built_by_plugin_and_by_body(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options: dict[str, Any] = {"target": "tensorrt", "precision": "fp16", "plugins": True, "fields": {"max_steps": 2}}
    convert(CONFORMANCE / "radial-gated-noexit", tmp_path / "b", max_length=32, golden=False, **options)
    for given, plugins in (["--plugins"], 2 * PRODUCTS), ([], 0):
        found = report(tmp_path / "b", "decode", *given)
        assert (found.get("plugins"), "error" in found) == (plugins, False), found
