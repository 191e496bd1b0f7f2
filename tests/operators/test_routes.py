"""The operators of routed layers, kernels and bodies, against plain numpy over random shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from conftest import session_options
from onnxscript import GraphBuilder

from dynexport.plugins.graph import add_functions
from dynexport.plugins.routes import gather_tokens, route_tokens, scatter_gated

FLOAT, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
CASES = 2000
Inputs = dict[str, np.ndarray]


def model(call: Callable[..., Any], inputs: Inputs, **attributes: bool) -> bytes:
    """A graph with one call, which knows nothing of its inputs' shapes."""
    graph = ir.Graph([], [], nodes=[], name="one", opset_imports={"": 24})
    values = []
    for name, array in inputs.items():
        values.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype))))
    graph.inputs.extend(values)
    made = call(GraphBuilder(graph).op, *values, **attributes)
    for value in made if isinstance(made, tuple) else (made,):
        value.shape = None
        graph.outputs.append(value)
    whole = ir.Model(graph, ir_version=11)
    add_functions(whole)
    return ir.to_proto(whole).SerializeToString()


def sessions(made: bytes) -> list[onnxruntime.InferenceSession]:
    """The library's kernel on one and on two threads, and the body."""
    kernels = [onnxruntime.InferenceSession(made, session_options(threads)) for threads in (1, 2)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return [*kernels, onnxruntime.InferenceSession(made, options)]


def drawn(random: np.random.Generator) -> tuple[int, int, int]:
    """Rows, tokens and features; at times none, at times enough for threads."""
    rows, tokens, features = (int(random.integers(low, high)) for low, high in ((0, 6), (0, 9), (1, 70)))
    return (3, 40, 2048) if random.random() < 0.02 else (rows, 1 if random.random() < 0.5 else tokens, features)


def test_route_tokens() -> None:
    random = np.random.default_rng(1)
    example = {
        "x": np.zeros((1, 1, 1), "f"),
        "weight": np.zeros((1, 1), "f"),
        "bias": np.zeros(1, "f"),
        "threshold": np.zeros((), "f"),
        "told": np.zeros((1, 1, 1), "f"),
        "room": np.zeros((1, 1, 1), np.int64),
    }
    opened = {inclusive: sessions(model(route_tokens, example, inclusive=inclusive)) for inclusive in (False, True)}
    seen = 0
    for i in range(CASES):
        rows, tokens, features = (max(1, size) for size in drawn(random))
        x = random.normal(size=(rows, tokens, features)).astype("f")
        weight, bias = random.normal(size=(1, features)).astype("f"), random.normal(size=1).astype("f")
        if i % 3 == 0:
            x[:], bias[:] = 0, 0  # every score is 0: sigmoid(0) is the threshold 0.5
        threshold = np.array(0.5 if i % 3 == 0 else random.random(), "f")
        told = random.choice([0, 0, 0, np.inf, -np.inf], (1, rows, tokens)).astype("f")
        room = random.integers(-1, tokens + 2, (1, rows, 1))
        score = x.astype(np.float64) @ weight[0].astype(np.float64) + bias[0]
        compared = 1 / (1 + np.exp(-score)) + told[0]
        inclusive = i % 2 == 0
        wanted = compared >= threshold if inclusive else compared > threshold
        if i % 3 and (np.abs(compared - threshold) < 1e-5).any():
            continue
        chosen = wanted & (wanted.cumsum(axis=1) <= room[0])
        for session in opened[inclusive]:
            inputs = {"x": x, "weight": weight, "bias": bias, "threshold": threshold, "told": told, "room": room}
            found = session.run(None, inputs)
            np.testing.assert_allclose(found[0][..., 0], score, rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(found[1], wanted[None])
            np.testing.assert_array_equal(found[2], chosen[None])
            assert found[3] == chosen.any()
        seen += chosen.sum() > 0
    assert seen > CASES // 4


def test_what_is_not_a_number_never_runs() -> None:
    inputs = {
        "x": np.full((2, 1, 3), np.nan, "f"),
        "weight": np.ones((1, 3), "f"),
        "bias": np.zeros(1, "f"),
        "threshold": np.array(0, "f"),
        "told": np.zeros((1, 2, 1), "f"),
        "room": np.ones((1, 2, 1), np.int64),
    }
    inputs["x"][1] = 1
    for session in sessions(model(route_tokens, inputs, inclusive=True)):
        assert session.run(None, inputs)[2].tolist() == [[[False], [True]]]


def test_gather_and_scatter() -> None:
    random = np.random.default_rng(2)
    first = {"x": np.zeros((1, 1, 1), "f"), "chosen": np.zeros((1, 1, 1), bool)}
    second = {
        "x": np.zeros((1, 1, 1), "f"),
        "y": np.zeros((1, 1), "f"),
        "score": np.zeros((1, 1, 1), "f"),
        "places": np.zeros((1, 2), np.int64),
    }
    gathers = sessions(model(gather_tokens, first))
    scatters = {sigmoid: sessions(model(scatter_gated, second, sigmoid=sigmoid)) for sigmoid in (False, True)}
    for i in range(CASES):
        rows, tokens, features = drawn(random)
        x = random.normal(size=(rows, tokens, features)).astype("f")
        chosen = random.random((1, rows, tokens)) < random.choice([0.0, 0.3, 1.0])
        score = random.normal(size=(rows, tokens, 1)).astype("f")
        y = random.normal(size=(int(chosen.sum()), features)).astype("f")
        gate = 1 / (1 + np.exp(-score.astype(np.float64))) if i % 2 else score
        expected = x.astype(np.float64)
        expected[chosen[0]] += gate[chosen[0]] * (y - x[chosen[0]].astype(np.float64))
        for gather, scatter in zip(gathers, scatters[bool(i % 2)], strict=True):
            line, places = gather.run(None, {"x": x, "chosen": chosen})
            np.testing.assert_array_equal(line, x[chosen[0]])
            np.testing.assert_array_equal(places, np.argwhere(chosen[0]))
            found = scatter.run(None, {"x": x, "y": y, "score": score, "places": places})[0]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "name", "wrong", "said"),
    [
        (gather_tokens, "x", np.zeros((2, 3), "f"), r"x: expected float32 \[B, S, H\], found \[2, 3\]"),
        (gather_tokens, "chosen", np.zeros((2, 3), bool), r"chosen: expected \[1, 2, 3\], found \[2, 3\]"),
        (scatter_gated, "y", np.zeros((1, 3), "f"), r"y: expected \[1, 4\], found \[1, 3\]"),
        (scatter_gated, "score", np.zeros((2, 3), "f"), r"score: expected \[2, 3, 1\], found \[2, 3\]"),
        (scatter_gated, "places", np.array([[2, 0]]), r"places: expected of \[2, 3\], found \[2, 0\]"),
        (scatter_gated, "places", np.array([[0, -1]]), r"places: expected of \[2, 3\], found \[0, -1\]"),
        (scatter_gated, "places", np.array([[0, 1], [1, 1]]), r"places: expected \[1, 2\], found \[2, 2\]"),
        (route_tokens, "weight", np.zeros((1, 3), "f"), r"weight: expected \[1, 4\], found \[1, 3\]"),
        (route_tokens, "bias", np.zeros(2, "f"), r"bias: expected \[1\], found \[2\]"),
        (route_tokens, "threshold", np.zeros(1, "f"), r"threshold: expected \[\], found \[1\]"),
        (route_tokens, "told", np.zeros((1, 3, 2), "f"), r"told: expected \[1, 2, 3\], found \[1, 3, 2\]"),
        (route_tokens, "room", np.zeros((1, 3, 1), np.int64), r"room: expected \[1, 2, 1\], found \[1, 3, 1\]"),
    ],
)
def test_wrong_inputs_are_refused(call: Any, name: str, wrong: np.ndarray, said: str) -> None:
    right: dict[Any, Inputs] = {
        gather_tokens: {"chosen": np.ones((1, 2, 3), bool)},
        scatter_gated: {
            "y": np.zeros((1, 4), "f"),
            "score": np.zeros((2, 3, 1), "f"),
            "places": np.zeros((1, 2), np.int64),
        },
        route_tokens: {
            "weight": np.zeros((1, 4), "f"),
            "bias": np.zeros(1, "f"),
            "threshold": np.zeros((), "f"),
            "told": np.zeros((1, 2, 3), "f"),
            "room": np.zeros((1, 2, 1), np.int64),
        },
    }
    inputs = {"x": np.zeros((2, 3, 4), "f"), **right[call], name: wrong}
    flags = {scatter_gated: {"sigmoid": True}, route_tokens: {"inclusive": True}}.get(call, {})
    session = onnxruntime.InferenceSession(model(call, inputs, **flags), session_options(1))
    with pytest.raises(Exception, match=said):
        session.run(None, inputs)
