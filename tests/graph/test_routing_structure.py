"""Routed graphs, looked at without running them; and that a graph with a number of tokens or a leak is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from test_structure import external, graphs, microsoft_schemas, names, subgraphs, used_inside  # noqa: F401 - a fixture
from tiny_models import EXEMPLARS, save_routed_model

from dynexport.exporter.bundle.conversion import Conversion, convert
from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.exporter.strategies.mod import routers, routing, writer
from dynexport.exporter.strategies.mod.checks import check_routed_graph

pytest.importorskip("transformers")

CAUSAL: dict[str, Any] = {"routed_layers": [0, 1, 3], "decision": {"rule": "predictor"}, "router_input": "normed"}
TOPK: dict[str, Any] = {"prefill": "topk", "capacity": 0.4, "rounding": "ceil"}
CONTRACTS = {"causal": CAUSAL, "topk": TOPK}
CASES = [(family, "causal", static, "fp32") for family in EXEMPLARS for static in (False, True)]
CASES += [("mistral", "topk", static, precision) for static in (False, True) for precision in ("fp32", "fp16")]
CASES += [("llama", "causal", static, precision) for static in (False, True) for precision in ("int8", "int4")]

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def routed_model(saved_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    @cache
    def save(family: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-routed") / "model"
        save_routed_model(directory, saved_model(family))
        return directory

    return save


@pytest.fixture(params=CASES, scope="module", ids=lambda case: "-".join(map(str, case)))
def done(request: pytest.FixtureRequest, routed_model: Models, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    family, contract, static, precision = request.param
    return convert(
        routed_model(family),
        tmp_path_factory.mktemp("bundle") / "b",
        fields=CONTRACTS[contract],
        static=static,
        precision=precision,
        golden=False,
    )


def test_onnx_checker_and_onnx_runtime(done: Conversion, microsoft_schemas: None) -> None:  # noqa: F811
    path = done.output / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    onnxruntime.InferenceSession(path, options)


def test_what_a_routed_graph_has_more_than_others(done: Conversion) -> None:
    [described], contract = done.manifest.graphs, done.manifest.contract
    inputs = {spec.name: spec for spec in described.inputs}
    outputs = {spec.name: (spec.dtype, spec.shape) for spec in described.outputs}
    count = len(contract.routed_layers)
    assert (inputs["token_counts"].dtype, inputs["token_counts"].shape) == ("int64", ("B",))
    assert (inputs["forced_routes"].dtype, inputs["forced_routes"].shape) == ("int64", (count, "B", "S"))
    assert ("is_prompt" in inputs) == (contract.prefill == "topk") and "layer_active" not in inputs
    assert outputs["routes"] == ("bool", (count, "B", "S"))
    assert outputs["route_scores"] == outputs["route_margins"] == ("float", (count, "B", "S"))
    assert outputs["overflow"] == ("int64", (count, "B"))
    for layer in described.layers:
        slots = "M_routed" if layer in contract.routed_layers else "M"
        for part in ("key", "value"):
            shape = inputs[f"past_key_values.{layer}.{part}"].shape
            assert shape[2] == slots and outputs[f"present.{layer}.{part}"] == ("float", shape)


def test_a_routed_layer_s_weights_are_behind_a_condition_or_nothing_is(done: Conversion) -> None:
    """Routers are in front of it, as they decide."""
    [graph] = graphs(done).values()
    branches = {branch.name: branch for branch in subgraphs(graph)}
    static = max(cache.slack for cache in done.manifest.caches) > 1
    routed = done.manifest.contract.routed_layers
    assert set(branches) == (set() if static else {f"layer_{i}_{kind}" for i in routed for kind in ("run", "skip")})
    for layer in () if static else routed:
        skipped, run = branches[f"layer_{layer}_skip"], used_inside(branches[f"layer_{layer}_run"])
        assert {node.op_type for node in skipped.node} == {"Identity"}
        weights = {name for name in external(graph) if name.startswith(f"model.layers.{layer}.")}
        assert {name for name in weights if ".mod_" not in name and "input_layernorm" not in name} <= run
        assert not {name for name in weights if ".mod_" in name} & run


def test_names_are_unique(done: Conversion) -> None:
    [graph] = graphs(done).values()
    outer = names(graph)
    for inner in map(names, subgraphs(graph)):
        assert len(outer + inner) == len({*outer, *inner})


# What is refused.

Change = Callable[[ir.Graph], object]


def refusal(
    change: Change,
    model: Path,
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    static: bool = False,
    fields: dict[str, Any] | None = None,
) -> str:
    """Convert, with a change of the graph before it is looked at; what is said of it, "" when nothing."""

    def look(graph: ir.Graph, *rest: Any) -> None:
        change(graph)
        check_routed_graph(graph, *rest)

    monkeypatch.setattr(writer, "check_routed_graph", look)
    try:
        convert(model, directory / "bundle", fields=fields or {"routed_layers": [1, 3]}, static=static, golden=False)
    except BrokenGraph as error:
        assert not (directory / "bundle").exists()
        return str(error)
    return ""


def nodes(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    """Subgraphs' too."""
    found = [node for node in graph.all_nodes() if node.op_type == op_type]
    assert found, f"no {op_type} in the graph"
    return found


def constant(graph: ir.Graph, numbers: int | list[int], dtype: type = np.int64) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, dtype))
    value = ir.Value(
        name=f"spoiled_{len(graph.initializers)}",
        shape=ir.Shape(tensor.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def baked(op_type: str, operand: int, numbers: int | list[int], which: int = -1, dtype: type = np.int64) -> Change:
    """Put a constant into an operand of a node."""

    def change(graph: ir.Graph) -> None:
        nodes(graph, op_type)[which].replace_input_with(operand, constant(graph, numbers, dtype))

    return change


def attribute(op_type: str, name: str, number: int, which: int = -1) -> Change:
    def change(graph: ir.Graph) -> None:
        node = nodes(graph, op_type)[which]
        node.attributes[name] = ir.AttrInt64(name, number)

    return change


def made_of(op_type: str, operand: int, inner: str, *sources: Any, **attributes: int) -> Change:
    """Put what another node makes of constants, or of the graph's first inputs' shapes, into an operand."""

    def change(graph: ir.Graph) -> None:
        values = [constant(graph, s) if not isinstance(s, str) else _named(graph, s) for s in sources]
        made = ir.node(inner, values, attributes=attributes)
        made.outputs[0].name, made.name = "made", "made_node"
        graph.insert_before(graph.node(0), made)
        nodes(graph, op_type)[-1].replace_input_with(operand, made.outputs[0])

    return change


def _named(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in (*graph.inputs, *graph.initializers.values()) if value.name == name)


BAKED: dict[str, tuple[str, bool, dict[str, Any], Change, str]] = {
    "k of padding": ("llama", True, CAUSAL, baked("Slice", 2, [8]), "(Slice): input 2 is the constant 8"),
    "k of top-k": ("llama", False, TOPK, baked("TopK", 1, [8], 0), "(TopK): input 1 is the constant 8"),
    "k of one": ("llama", False, TOPK, baked("TopK", 1, [1], 0), "(TopK): input 1 is the constant 1"),
    "k from constants": (
        "llama",
        True,
        CAUSAL,
        made_of("Slice", 2, "Add", [5], [3]),
        "made is computed from constants",
    ),
    "k from a weight's shape": (
        "llama",
        True,
        CAUSAL,
        made_of("Slice", 2, "Shape", "model.embed_tokens.weight", start=1),
        "made is computed from constants",
    ),
    "k from a number of layers": (
        "llama",
        True,
        CAUSAL,
        made_of("Slice", 2, "Shape", "cache_lengths", start=0, end=1),
        "made is computed from constants",
    ),
    "a bound of k": ("llama", True, CAUSAL, baked("Min", 1, 9, 0), "(Min): spoiled_"),
    "a share of k": ("llama", True, TOPK, baked("Div", 1, 9, 0), "(Div): spoiled_"),
    "a share of a row": ("llama", False, TOPK, baked("Div", 1, 9, 1), "(Div): spoiled_"),
    "a rank": ("llama", False, TOPK, baked("Less", 1, 9, 2), "(Less): compares with the constant 9"),
    "a rank in the cache": ("llama", True, CAUSAL, baked("LessOrEqual", 1, 9), "(LessOrEqual): compares with the"),
    "tokens of a step": ("llama", False, CAUSAL, baked("Range", 1, 8, 0), "(Range): input 1 is the constant 8"),
    "tokens of a branch": ("llama", False, CAUSAL, baked("Range", 1, 8), "run/Range"),
    "end of the keys": ("mistral", False, CAUSAL, baked("Slice", 2, [8]), "(Slice): input 2 is the constant 8"),
    "start of the keys": ("mistral", False, CAUSAL, baked("Slice", 1, [2]), "(Slice): input 1 is the constant 2"),
    "shape of decisions": ("llama", False, CAUSAL, baked("Reshape", 1, [1, 1, 8], 0), "(Reshape): its shape [1, 1, 8]"),
    "shape of a line": ("llama", False, CAUSAL, baked("Reshape", 1, [8, 32]), "(Reshape): its shape [8, 32]"),
    "shape of heads": ("qwen3", True, CAUSAL, baked("Reshape", 1, [-1, 8, 4, 16], 1), "(Reshape): its shape [-1, 8, 4"),
    "shape of places": ("llama", True, CAUSAL, baked("Expand", 1, [1, 8]), "(Expand): its shape [1, 8]"),
    "keys of attention": (
        "llama",
        True,
        CAUSAL,
        baked("GroupQueryAttention", 6, 8, dtype=np.int32),
        "(GroupQueryAttention): input 6 is the constant 8",
    ),
    "last key of a row": (
        "llama",
        False,
        CAUSAL,
        baked("GroupQueryAttention", 5, [7, 7], dtype=np.int32),
        "(GroupQueryAttention): input 5 is the constant 7",
    ),
    "place of an entry": ("mistral", True, CAUSAL, baked("TensorScatter", 2, [8]), "(TensorScatter): input 2"),
    "a cut through tokens": ("llama", False, {}, attribute("Split", "axis", 1, 0), "(Split): cuts what may be"),
    "a token picked": ("llama", False, {}, attribute("Gather", "axis", 1, 0), "(Gather): picks the constant places"),
}


@pytest.mark.parametrize("case", BAKED)
def test_a_number_of_tokens_is_refused(
    case: str, routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, static, fields, change, expected = BAKED[case]
    told = refusal(change, routed_model(family), tmp_path, monkeypatch, static=static, fields=fields)
    assert expected in told, told


def shaped(name: str, shape: Sequence[int | str]) -> Change:
    def change(graph: ir.Graph) -> None:
        value = next(value for value in (*graph.inputs, *graph.outputs) if value.name == name)
        value.shape = ir.Shape(shape)

    return change


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_ids", ["B", 8]),
        ("input_ids", [1, "S"]),
        ("token_counts", [2]),
        ("forced_routes", [2, "B", 8]),
        ("logits_indices", ["B", 1]),
        ("logits", ["B", 8, 97]),
        ("routes", [2, "B", 8]),
        ("overflow", [2, 1]),
        ("past_key_values.0.key", ["B", 2, 64, 8]),
        ("past_key_values.1.key", ["B", 2, "M", 8]),
        ("present.1.value", ["B", 2, 64, 8]),
        ("present.1.value", ["B", 2, "M_routed"]),
        ("route_scores", ["R", "B", "S"]),
    ],
)
def test_a_dimension_that_became_a_number_is_refused(
    name: str, shape: list[int | str], routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = refusal(shaped(name, shape), routed_model("llama"), tmp_path, monkeypatch)
    assert told.startswith(f"{name}: expected dimensions") and told.endswith(f"found {shape}")


def by_rank(op: Any, logit: ir.Value) -> ir.Value:
    values, _ = op.TopK(logit, op.Shape(logit, start=2, end=3), axis=2, _outputs=2)
    return op.GreaterOrEqual(logit, op.ReduceMean(values, [2], keepdims=1))


def _places(op: Any, x: ir.Value) -> ir.Value:
    return op.Range(0, op.Squeeze(op.Shape(x, start=2, end=3), [0]), 1)


def _square(op: Any, x: ir.Value) -> ir.Value:
    length = op.Shape(x, start=2, end=3)
    return op.Concat(length, length, axis=0)


LEAKS: dict[str, tuple[Callable[[Any, ir.Value], ir.Value], str]] = {
    "softmax": (lambda op, x: op.Greater(op.Softmax(x, axis=2), 0.1), "(Softmax)"),
    "mean": (lambda op, x: op.Greater(x, op.ReduceMean(x, [2], keepdims=1)), "(ReduceMean)"),
    "best": (lambda op, x: op.Equal(x, op.ReduceMax(x, [2], keepdims=1)), "(ReduceMax)"),
    "top-k": (by_rank, "(TopK)"),
    "sum from the end": (lambda op, x: op.Greater(op.CumSum(x, 2, reverse=1), 0.0), "(CumSum)"),
    "sum over rows": (lambda op, x: op.Greater(op.CumSum(x, 1), 0.0), "(CumSum)"),
    "norm over tokens": (lambda op, x: op.Greater(op.LayerNormalization(x, 1.0, axis=-1), 0.0), "(LayerNormalization)"),
    "product over tokens": (lambda op, x: op.Greater(op.MatMul(x, op.Expand(1.0, _square(op, x))), 0.0), "(MatMul)"),
    "pairs of tokens": (lambda op, x: op.Greater(op.Transpose(x, perm=[0, 2, 1]), x), "(Transpose)"),
    "the next token": (lambda op, x: op.Greater(op.Slice(x, [1], op.Shape(x, start=2), [2]), 0.0), "(Slice)"),
    "backwards": (lambda op, x: op.Greater(op.Gather(x, op.Neg(_places(op, x)), axis=2), 0.0), "(Gather)"),
    "another token": (
        lambda op, x: op.Greater(op.GatherElements(x, op.Cast(op.Abs(x), to=ir.DataType.INT64), axis=2), 0.0),
        "(GatherElements)",
    ),
    "a later condition": (lambda op, x: op.And(op.Greater(x, 0.0), op.Less(op.ReduceSum(x), 9.0)), "(ReduceSum)"),
}


@pytest.mark.parametrize(("leak", "fields"), [*((leak, {}) for leak in LEAKS), ("top-k", TOPK), ("mean", TOPK)])
def test_a_decision_by_later_tokens_is_refused(
    leak: str, fields: dict[str, Any], routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With top-k for prompts too: only what ``is_prompt`` selects may look ahead."""
    decide, expected = LEAKS[leak]
    monkeypatch.setattr(routing, "_causal", lambda op, contract, layer, logit, told: decide(op, logit))
    told = refusal(lambda graph: None, routed_model("llama"), tmp_path, monkeypatch, fields=fields)
    assert expected in told, told


@pytest.mark.parametrize(
    "decide",
    [
        lambda op, x: op.Greater(op.CumSum(x, 2), 0.0),
        lambda op, x: op.Greater(op.CumSum(x, -1, exclusive=1), x),
        lambda op, x: op.Not(op.Less(op.Sigmoid(op.Neg(x)), op.Where(op.Greater(x, 1.0), x, 0.5))),
    ],
    ids=["sum so far", "sum before", "one by one"],
)
def test_a_decision_by_earlier_tokens_may_be(
    decide: Callable[[Any, ir.Value], ir.Value], routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "_causal", lambda op, contract, layer, logit, told: decide(op, logit))
    assert refusal(lambda graph: None, routed_model("llama"), tmp_path, monkeypatch) == ""


def test_a_router_over_tokens_is_refused(routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the decision too: its input mixed with its row's."""
    predictor = routers.Predictor.forward

    def forward(self: routers.Predictor, op: Any, x: ir.Value) -> ir.Value:
        return predictor(self, op, op.Sub(x, op.ReduceMean(x, [1], keepdims=1)))

    monkeypatch.setattr(routers.Predictor, "forward", forward)
    told = refusal(lambda graph: None, routed_model("llama"), tmp_path, monkeypatch, fields=CAUSAL)
    assert "(ReduceMean): expected causal routes" in told


def test_a_decision_by_something_else_is_refused(
    routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(op: Any, contract: object, layer: int, logit: ir.Value, told: ir.Value) -> ir.Value:
        ids = next(value for value in op.builder.graph.inputs if value.name == "input_ids")
        return op.Greater(op.Unsqueeze(ids, [0]), 0)

    monkeypatch.setattr(routing, "_causal", decide)
    told = refusal(lambda graph: None, routed_model("llama"), tmp_path, monkeypatch)
    assert told == "input_ids: expected routes from hidden_states.0 alone, found that they use this input"


def test_top_k_on_the_wrong_side_of_is_prompt_is_refused(
    routed_model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swap(graph: ir.Graph) -> None:
        either = nodes(graph, "Or")[0]
        for select in (value.producer() for value in either.inputs):
            place = 1 if select.inputs[0].name == "is_prompt" else 0
            select.replace_input_with(0, constant(graph, [True], bool) if place else _named(graph, "is_prompt"))

    told = refusal(swap, routed_model("llama"), tmp_path, monkeypatch, fields=TOPK)
    assert "expected causal routes" in told
