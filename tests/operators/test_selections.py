"""The operators that choose layers and compute with the chosen ones' weights, against numpy over thousands of calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import session_options
from onnxscript import GraphBuilder
from product_models import BlockCase, HalfCase, rounded

from dynexport.plugins import selections
from dynexport.plugins.graph import add_functions

Array = np.ndarray
SEEDS = range(2)
# Groups of calls of one session each, and calls of a group; of some of these the body runs too.
GROUPS, CALLS, BODIES = 6, 40, 5
Attributes = Mapping[str, Any]


def model(write: Callable[..., Any], inputs: Mapping[str, Array], **attributes: Any) -> bytes:
    """A model of one call, which knows nothing of its inputs' shapes."""
    graph = ir.Graph([], [], nodes=[], name="one", opset_imports={"": 24})
    for name, array in inputs.items():
        kind = ir.TensorType(ir.tensor(array).dtype)
        graph.inputs.append(ir.Value(name=name, type=kind))
    made = write(GraphBuilder(graph).op, *graph.inputs, **attributes)
    for i, value in enumerate(made if isinstance(made, tuple) else (made,)):
        value.name = f"y{i}"
        graph.outputs.append(value)
    whole = ir.Model(graph, ir_version=11)
    add_functions(whole)
    return ir.to_proto(whole).SerializeToString()


class Call:
    """One call in two sessions, for inputs of all sizes: by the library, and by the body."""

    def __init__(self, write: Callable[..., Any], example: Mapping[str, Array], **attributes: Any) -> None:
        made = model(write, example, **attributes)
        self._sessions = [
            onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
            for options in (onnxruntime.SessionOptions(), session_options(2))
        ]

    def run(self, inputs: Mapping[str, Array], *, library: bool = True) -> list[Array]:
        session = self._sessions[library]
        given = {node.name: ort_value(inputs[node.name]) for node in session.get_inputs()}
        return [value.numpy() for value in session.run_with_ort_values(None, given)]


def ort_value(array: Array) -> onnxruntime.OrtValue:
    if array.dtype != ml_dtypes.bfloat16:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    bits = np.ascontiguousarray(array).view(np.uint16)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, int(ir.DataType.BFLOAT16))


def ran(write: Callable[..., Any], inputs: Mapping[str, Array], *, library: bool = True, **told: Any) -> list[Array]:
    return Call(write, inputs, **told).run(inputs, library=library)


def drawn_rows(random: np.random.Generator, layers: int, columns: int) -> dict[str, Array]:
    """Rows of which neighbours often have the same layer, and some none."""
    rows = int(random.integers(1, 9))
    index = np.repeat(random.integers(-1, layers, rows), random.integers(1, 4, rows))[:rows]
    return {"x": random.normal(size=(len(index), 1, columns)).astype(np.float32), "index": index}


def expected(x: Array, index: Array, weights: list[Array]) -> tuple[Array, Array]:
    """The products in float64, and the sums of what is added."""
    none = np.zeros((1, len(weights[0])))
    products = [none if i < 0 else row.astype(np.float64) @ weights[i].T for row, i in zip(x, index, strict=True)]
    added = [none if i < 0 else np.abs(row) @ np.abs(weights[i]).T for row, i in zip(x, index, strict=True)]
    return np.stack(products), np.stack(added)


def check_block_products(random: np.random.Generator, call: Call, first: BlockCase, *, body: bool) -> None:
    """Compare matrices of one kind, which have blocks and layers of any number."""
    same = {"bits": first.bits, "size": first.q.shape[2], "dtype": first.scale.dtype.type, "rows": len(first.q)}
    blocks = int(random.integers(1, 9))
    more = [BlockCase.drawn(random, blocks=blocks, **same) for _ in range(int(random.integers(1, 4)))]
    minimum = random.normal(size=more[0].scale.shape).astype(same["dtype"]) if random.random() < 0.5 else None
    cases = [replace(case, zero=first.zero, minimum=minimum) for case in more]
    parts = [np.stack(part) for part in zip(*(case.parts() for case in cases), strict=True)]
    inputs = drawn_rows(random, len(cases), cases[0].columns)
    inputs |= dict(zip(("quantized", "scales", "minima"), parts, strict=True))
    (found,) = call.run(inputs)
    x = rounded(inputs["x"], same["size"])
    right, added = expected(x, inputs["index"], [case.weight() for case in cases])
    spread = max(np.abs(case.scale.astype(np.float64)).max() for case in cases) * 2 * max(1, first.zero)
    more_added = np.abs(x).sum(axis=-1, keepdims=True) * spread
    np.testing.assert_array_less(np.abs(found - right), 1e-5 * (added + more_added) + 1e-12)
    assert not found[inputs["index"] < 0].any()
    if body:
        (others,) = call.run(inputs, library=False)
        assert np.linalg.norm(others - found) <= 0.03 * np.linalg.norm(added)
        assert not others[inputs["index"] < 0].any()


@pytest.mark.parametrize("seed", SEEDS)
def test_block_products(kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(GROUPS):
        first = BlockCase.drawn(random)
        example = dict(zip(("quantized", "scales", "minima"), ([part] for part in first.parts()), strict=True))
        inputs = drawn_rows(random, 1, 8) | {name: np.array(part) for name, part in example.items()}
        call = Call(selections.selected_block_matmul, inputs, **first.attributes())
        for i in range(CALLS):
            check_block_products(random, call, first, body=i % BODIES == 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_half_and_float_products(kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for group in range(GROUPS):
        first, call = HalfCase.drawn(random), None
        for i in range(CALLS):
            shape = (int(random.integers(1, 5)), len(first.values), 2 * int(random.integers(1, 80)))
            cases = [HalfCase(values) for values in random.normal(size=shape).astype(first.values.dtype)]
            inputs = drawn_rows(random, len(cases), shape[2])
            if group % 2:
                inputs["weights"] = np.stack([case.values.astype(np.float32) for case in cases])
                call = call or Call(selections.selected_float_matmul, inputs)
            else:
                inputs["weights"] = np.stack([case.parts()[0] for case in cases])
                call = call or Call(selections.selected_half_matmul, inputs, rows=shape[1])
            right, added = expected(inputs["x"], inputs["index"], [case.weight() for case in cases])
            tolerance = 0.01 if kernels == "avx512-bf16" and not group % 2 else 1e-5  # bf16 instructions round x
            for library in (True, False)[: 1 + (i % BODIES == 0)]:
                (found,) = call.run(inputs, library=library)
                np.testing.assert_array_less(np.abs(found - right), tolerance * added + 1e-12)


def norm(op: Any, x: Any, index: Any, weights: Any) -> Any:
    return selections.selected_norm(op, x, index, weights, 1e-5)


def add_norm(op: Any, x: Any, index: Any, weights: Any, residual: Any) -> Any:
    return selections.selected_add_norm(op, x, index, weights, 1e-5, residual)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("by_head", [False, True])
def test_norms(kernels: str, by_head: bool, adds: bool) -> None:
    random = np.random.default_rng(2 * by_head + adds)
    call = None
    for i in range(GROUPS * CALLS):
        size, heads, layers = (int(random.integers(1, most)) for most in (80, 4, 5))
        inputs = drawn_rows(random, layers, size)
        if by_head:
            inputs["x"] = random.normal(size=(len(inputs["index"]), 1, heads, size)).astype(np.float32)
        inputs["weights"] = random.normal(size=(layers, size)).astype(np.float32)
        total = inputs["x"].astype(np.float64)
        if adds:
            inputs["residual"] = random.normal(size=inputs["x"].shape).astype(np.float32)
            total = total + inputs["residual"]
        call = call or Call(add_norm if adds else norm, inputs)
        weight = inputs["weights"][np.maximum(inputs["index"], 0)].reshape(-1, *[1] * (total.ndim - 2), size)
        right = total / np.sqrt((total**2).mean(axis=-1, keepdims=True) + 1e-5) * weight
        for library in (True, False)[: 1 + (i % BODIES == 0)]:
            found = call.run(inputs, library=library)
            np.testing.assert_allclose(found[0], right, rtol=1e-5, atol=1e-6)
            if adds:
                np.testing.assert_allclose(found[1], total, rtol=1e-6, atol=1e-6)


def routed(inputs: Mapping[str, Array], told: Mapping[str, Any]) -> list[list[Any]]:
    """Index, path, score, margin and gate of every row, and what it has seen, as docs/routing-contract.md says."""
    found = []
    for row, x in enumerate(inputs["x"][:, 0].astype(np.float64)):
        normed = x / np.sqrt((x**2).mean() + told["epsilon"]) * inputs["norm"]
        inner = inputs["fc1"] @ normed + inputs["bias1"]
        scores = inputs["fc2"] @ (inner / (1 + np.exp(-inner))) + inputs["bias2"]
        seen = inputs["seen"][row].copy()
        allowed = [told["exits"] if i == told["layers"] else not seen[i] for i in range(len(scores))]
        if inputs["before"][row] < 0 or not any(allowed):
            found.append([-1, -1, 0.0, np.inf, 0.0, seen])
            continue
        masked = np.where(allowed, scores, -np.inf)
        ordered = np.sort(masked)[::-1]
        choice = inputs["forced"][told["hop"], row, 0]
        choice = int(masked.argmax()) if choice < 0 else int(choice)
        gate = np.exp(masked - ordered[0])[choice] / np.exp(masked - ordered[0]).sum()
        margin = ordered[0] - ordered[1] if len(scores) > 1 else np.inf
        if choice < told["layers"] and not told["reuses"]:
            seen[choice] = True
        found.append([choice if choice < told["layers"] else -1, choice, scores[choice], margin, gate, seen])
    return found


def drawn_kind(random: np.random.Generator) -> dict[str, Any]:
    """What the calls of one session have in common."""
    layers = int(random.integers(1, 30))
    choices = layers + int(random.integers(0, 2))
    exits = choices > layers and bool(random.random() < 0.5)
    hop, reuses = int(random.integers(0, 3)), bool(random.random() < 0.5)
    return {"hop": hop, "layers": layers, "epsilon": 1e-5, "exits": exits, "reuses": reuses, "choices": choices}


def drawn_hop(random: np.random.Generator, kind: Attributes) -> dict[str, Array]:
    rows, hidden, units = (int(random.integers(1, most)) for most in (6, 50, 40))
    layers, choices, hops = kind["layers"], kind["choices"], kind["hop"] + int(random.integers(1, 4))
    sizes = {"norm": hidden, "fc1": (units, hidden), "bias1": units, "fc2": (choices, units), "bias2": choices}
    inputs: dict[str, Array] = {"x": random.normal(size=(rows, 1, hidden)).astype(np.float32)}
    inputs |= {name: random.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    inputs["forced"] = np.where(random.random((hops, rows, 1)) < 0.5, -1, random.integers(0, choices, (hops, rows, 1)))
    inputs["before"] = random.integers(-1, layers, rows)
    inputs["seen"] = random.random((rows, choices)) < random.choice([0.0, 0.5, 1.0])
    if choices > layers:
        inputs["seen"][:, layers] = False
    return inputs


def hop(op: Any, x: Any, *values: Any, choices: int, **told: Any) -> Any:
    *weights, forced, before, seen = values
    router = selections.RouterWeights(*weights)
    made = selections.choose_layer(op, x, router, forced, before, seen, **told)
    return tuple(getattr(made, name) for name in ("index", "path", "score", "margin", "gate", "seen", "any"))


def check_hop(found: list[Array], right: list[list[Any]]) -> None:
    *parts, found_any = found
    assert found_any.shape == () and bool(found_any) == any(row[0] >= 0 for row in right)
    for row, (index, path, score, margin, gate, seen) in enumerate(right):
        ours = [part.reshape(len(right), -1)[row] for part in parts]
        assert (ours[0][0], ours[1][0]) == (index, path) and (ours[5] == seen).all()
        np.testing.assert_allclose([ours[2][0], ours[3][0]], [score, margin], rtol=1e-4, atol=2e-5)
        if path < 0 or score > -np.inf:
            assert path < 0 or abs(ours[4][0] - gate) < 1e-4


@pytest.mark.parametrize("seed", SEEDS)
def test_choices(kernels: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(GROUPS):
        kind, call = drawn_kind(random), None
        for i in range(CALLS):
            inputs = drawn_hop(random, kind)
            call = call or Call(hop, inputs, **kind)
            right = routed(inputs, kind)
            for library in (True, False)[: 1 + (i % BODIES == 0)]:
                check_hop(call.run(inputs, library=library), right)


def test_ties_and_scores_that_are_not_finite(kernels: str) -> None:
    told = drawn_kind(np.random.default_rng(3))
    inputs = drawn_hop(np.random.default_rng(3), told)
    rows = len(inputs["x"])
    inputs["fc2"][:], inputs["bias2"][:], inputs["seen"][:] = 0, 1, False
    inputs["forced"][:], inputs["before"] = -1, np.zeros(rows, np.int64)
    for library in (True, False):
        index, _, score, margin, *_ = ran(hop, inputs, library=library, **told)
        assert (index == 0).all() and (score == 1).all() and (margin == 0).all()
    inputs["bias2"][-1] = np.nan
    assert np.isnan(ran(hop, inputs, **told)[2]).all()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("index", np.array([3]), r"index: expected -1..2, found 3"),
        ("index", np.array([-2]), r"index: expected -1..2, found -2"),
        ("index", np.array([0, 1]), r"index: expected \[1\], found \[2\]"),
        ("weights", np.zeros((0, 4, 6), np.float32), r"weights: expected 3 axes"),
        ("weights", np.zeros((4, 6), np.float32), r"weights: expected 3 axes"),
        ("x", np.zeros((1, 1, 5), np.float32), r"x: expected float32 \[.., 6\]"),
    ],
)
def test_refusals_of_products(name: str, value: Array, said: str) -> None:
    inputs = {"x": np.zeros((1, 1, 6), np.float32), "index": np.array([0]), "weights": np.zeros((3, 4, 6), np.float32)}
    inputs[name] = value
    with pytest.raises(Exception, match=said):
        ran(selections.selected_float_matmul, inputs)


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("forced", lambda array: array + 1000, r"forced: expected at most \d+, found"),
        ("forced", lambda array: array[:, :0], "forced: expected"),
        ("before", lambda array: array[:0], "before: expected"),
        ("seen", lambda array: array[:, :0], "seen: expected"),
        ("norm", lambda array: array[:0], "norm: expected"),
        ("fc2", lambda array: array[:, :0], "fc2: expected"),
        ("bias1", lambda array: np.append(array, array), "bias of fc1: expected"),
    ],
)
def test_refusals_of_choices(name: str, spoil: Callable[[Array], Array], said: str) -> None:
    told = drawn_kind(np.random.default_rng(4))
    inputs = drawn_hop(np.random.default_rng(4), told)
    inputs["before"][:], inputs["seen"][:] = 0, False
    inputs[name] = spoil(inputs[name])
    with pytest.raises(Exception, match=said):
        ran(hop, inputs, **told)
