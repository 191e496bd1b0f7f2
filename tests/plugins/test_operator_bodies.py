"""The standard-op bodies, run by ONNX Runtime, against the operators' meaning in plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxscript import GraphBuilder
from operator_models import BY_NAME, agree, draw, model, session

from dynexport.plugins import graph as add
from dynexport.plugins.functions import functions, schemas
from dynexport.plugins.schema import DOMAIN, FLOATS

SIZE = st.integers(1, 9)


@st.composite
def sizes(draw_one: st.DrawFn, name: str) -> dict[str, int]:
    letters = {letter for tensor in BY_NAME[name].inputs for letter in tensor.dims}
    drawn = {letter: draw_one(SIZE) for letter in sorted(letters)}
    if "S" in drawn:
        drawn["S"] = draw_one(st.integers(drawn["K"], 12))
    return drawn


@pytest.mark.parametrize("name", BY_NAME)
@settings(deadline=None, max_examples=60)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_body_means_what_the_operator_means(name: str, data: st.DataObject, seed: int) -> None:
    arrays = draw(name, data.draw(sizes(name)), seed)
    agree(name, session(name).run(None, arrays), arrays, tolerance=1e-5)


@pytest.mark.parametrize("name", [name for name in BY_NAME if name != "CapacityTopK"])
def test_body_in_half_precision(name: str) -> None:
    sizes = {"B": 3, "S": 11, "H": 8, "K": 5, "h": 2, "M": 9, "D": 4, "L": 3, "J": 6, "N": 7}
    for seed in range(5):
        arrays = draw(name, sizes, seed, np.float16)
        found = session(name, ir.DataType.FLOAT16).run(None, arrays)
        assert found[0].dtype == np.float16
        agree(name, found, arrays, tolerance=5e-3)


def choose(scores: list[float], count: int, slots: int) -> tuple[list[int], list[int]]:
    arrays = {"scores": np.array([scores], np.float32), "counts": np.array([count]), "slots": np.arange(slots)}
    found: tuple[Any, Any] = session("CapacityTopK").run(None, arrays)
    agree("CapacityTopK", found, arrays, tolerance=0)
    return found[0][0].tolist(), found[1][0].tolist()


def test_ties_go_to_the_lower_position() -> None:
    assert choose([2.0, 5.0, 5.0, 5.0, 7.0], 3, 3) == ([1, 2, 4], [1, 1, 1])


def test_nothing_and_everything_can_be_wanted() -> None:
    assert choose([1.0, 2.0, 3.0], 0, 2)[1] == [0, 0]
    assert choose([3.0, 1.0, 2.0], 3, 3) == ([0, 1, 2], [1, 1, 1])
    assert choose([0.5], 1, 1) == ([0], [1])


def test_nan_and_minus_infinity_never_win() -> None:
    positions, valid = choose([np.nan, 1.0, -np.inf, 2.0], 4, 4)
    assert (positions[:2], valid) == ([1, 3], [1, 1, 0, 0])


def test_a_long_row() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 65_536)).astype(np.float32)
    arrays = {"scores": scores, "counts": np.array([8_000]), "slots": np.arange(8_192)}
    agree("CapacityTopK", session("CapacityTopK").run(None, arrays), arrays, tolerance=0)


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("dtype", FLOATS)
def test_models_pass_the_checker(name: str, dtype: ir.DataType) -> None:
    onnx.checker.check_model(model(name, dtype), full_check=True)


def test_functions_use_standard_operators_alone() -> None:
    assert [function.name for function in functions()] == list(BY_NAME)
    for function in functions():
        assert {node.domain for node in function.graph.all_nodes()} == {""}
        assert function.opset_imports == {"": 24}


@pytest.fixture()
def registered() -> Any:
    for schema in schemas():
        onnx.defs.register_schema(schema)
    yield
    for name in BY_NAME:
        onnx.defs.deregister_schema(name, 1, DOMAIN)


@pytest.mark.parametrize("name", BY_NAME)
def test_schema_infers_what_the_function_infers(name: str, registered: None) -> None:
    proto = model(name, ir.DataType.FLOAT16)
    by_function = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.output
    del proto.functions[:]
    for output in proto.graph.output:
        output.type.Clear()
    by_schema = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph.output
    assert [str(output.type) for output in by_schema] == [str(output.type) for output in by_function]


def test_a_call_in_a_branch_gets_its_function() -> None:
    made = ir.Graph([], [], nodes=[], name="branches", opset_imports={"": 24})
    for name, dtype, shape in (("x", FLOATS[0], ["N", 4]), ("index", ir.DataType.INT64, ["N"])):
        made.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape)))
    condition = ir.Value(name="condition", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    x, index = made.inputs
    made.inputs.append(condition)
    op = GraphBuilder(made).op
    weight = op.initializer(ir.tensor(np.ones((2, 4, 4), np.float32)), "weight")
    run = op.builder.subgraph(lambda op: add.selected_matmul(op, x, weight, index), [], [ir.Value()], name="run")
    skip = op.builder.subgraph(lambda op: op.Identity(x), [], [ir.Value()], name="skip")
    output = op.If(condition, then_branch=run, else_branch=skip)
    output.name, output.type, output.shape = "y", x.type, x.shape
    made.outputs.append(output)
    whole = ir.Model(made, ir_version=11)
    add.add_functions(whole)
    session = onnxruntime.InferenceSession(ir.to_proto(whole).SerializeToString())
    given = {"x": np.ones((1, 4), np.float32), "index": np.array([1])}
    for ran, wanted in ((True, 4.0), (False, 1.0)):
        assert session.run(None, {**given, "condition": np.array(ran)})[0].tolist() == [[wanted] * 4]


def test_only_functions_that_are_called_are_added() -> None:
    assert [function.name for function in model("SelectedMatMul").functions] == ["SelectedMatMul"]
    empty = ir.Model(ir.Graph([], [], nodes=[], name="empty", opset_imports={"": 24}), ir_version=11)
    add.add_functions(empty)
    assert (len(empty.functions), DOMAIN in empty.graph.opset_imports) == (0, False)
