"""4-bit rounding: packed values are what they should be, with smaller errors than those of the nearest integers."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dynexport.exporter.lowering.searched import SearchedBlocks
from dynexport.exporter.lowering.storage import BlockQuantized
from dynexport.exporter.quantise.feedback import with_feedback
from dynexport.exporter.quantise.integers import search

Array = NDArray[np.float32]
SIZE = 32


def unpacked(parts: dict[str, NDArray[np.generic]], columns: int) -> Array:
    """The values of packed parameters, one by one, as ONNX Runtime's description of MatMulNBits says."""
    packed, scales = parts["_quantized"], parts["_scales"]
    zeros = parts.get("_zero_points")
    values = np.zeros((len(packed), columns), np.float32)
    for row in range(len(packed)):
        for column in range(columns):
            block, place = divmod(column, SIZE)
            zero = 8 if zeros is None else half(zeros[row, block // 2], block)
            values[row, column] = (half(packed[row, block, place // 2], place) - zero) * scales[row, block]
    return values


def half(byte: np.generic, index: int) -> int:
    return int(byte) >> 4 if index % 2 else int(byte) & 15


def product(parts: dict[str, NDArray[np.generic]], x: Array, rows: int, columns: int) -> Array:
    """What ONNX Runtime multiplies by, with activations in float32."""
    names = ["_quantized", "_scales", "_zero_points"]
    node = helper.make_node(
        "MatMulNBits",
        ["x", *names],
        ["y"],
        domain="com.microsoft",
        N=rows,
        K=columns,
        bits=4,
        block_size=SIZE,
        accuracy_level=1,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, rows])],
        [onnx.numpy_helper.from_array(np.asarray(parts[name]), name) for name in names],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {"x": x})[0]
    return found


def matrix(seed: int, rows: int, columns: int) -> Array:
    """Blocks of different sizes that are not centred, some of zeros, some of equal values."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, columns)) + random.standard_normal((rows, 1))
    values *= 10.0 ** random.integers(-6, 3, (rows, 1))
    values[random.random(rows) < 0.1] = 0
    values[random.random(rows) < 0.1] = -0.25
    return values.astype(np.float32)


def inputs(seed: int, count: int, columns: int) -> Array:
    """Correlated inputs with a few large channels."""
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, columns // 4)) @ random.standard_normal((columns // 4, columns))
    mixed += 0.3 * random.standard_normal((count, columns))
    mixed[:, ::17] *= 8
    return mixed.astype(np.float32)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 20), columns=st.integers(1, 130))
def test_packed_values_are_what_the_engine_multiplies_by(seed: int, rows: int, columns: int) -> None:
    weight = matrix(seed, rows, columns)
    parts = SearchedBlocks().pack(weight)
    shapes = {name: tuple(value.shape) for name, value in SearchedBlocks().parameters([rows, columns]).items()}
    assert {name: value.shape for name, value in parts.items()} == shapes
    values = unpacked(parts, columns)
    x = np.eye(columns, dtype=np.float32)
    np.testing.assert_allclose(product(parts, x, rows, columns), values.T, rtol=1e-5, atol=1e-30)
    # No value is further away than a whole block's range in 15 steps, widened by what the search tries.
    spans = np.maximum(weight.max(axis=1), 0) - np.minimum(weight.min(axis=1), 0)
    assert (np.abs(values - weight).max(axis=1) <= spans / 4).all()


def test_the_search_is_better_than_the_nearest_integers() -> None:
    """Also for rows of equal values and rows whose values are all of one sign."""
    weight = matrix(6, 200, 128)
    searched, nearest = SearchedBlocks().pack(weight), BlockQuantized(4).pack(weight)
    before, after = (np.square(unpacked(parts, 128) - weight).sum(axis=1) for parts in (nearest, searched))
    rounded = before > 1e-12 * np.square(weight).sum(axis=1)
    shares = after[rounded] / before[rounded]
    assert rounded.sum() > 150 and shares.mean() < 0.75 and shares.max() < 1.2


def test_importance_moves_the_error_to_columns_that_count_less() -> None:
    weight = matrix(1, 64, 128)
    importance = np.where(np.arange(128) % 4 == 0, 100, 1).astype(np.float32)
    plain, weighted = (
        np.square(unpacked(SearchedBlocks().packed(found), 128) - weight)
        for found in (search(weight, SIZE), search(weight, SIZE, importance))
    )
    assert (weighted * importance).sum() < 0.8 * (plain * importance).sum()


@pytest.mark.parametrize("columns", [128, 120])
def test_feedback_makes_up_for_errors(columns: int) -> None:
    x, weight = inputs(2, 512, columns), np.random.default_rng(3).standard_normal((48, columns)).astype(np.float32)
    before = weight.copy()
    fed = SearchedBlocks().packed(with_feedback(weight, x.T @ x, SIZE))
    np.testing.assert_array_equal(weight, before)
    errors = [
        np.square((unpacked(parts, columns) - weight) @ x.T).sum()
        for parts in (fed, SearchedBlocks().pack(weight), BlockQuantized(4).pack(weight))
    ]
    assert errors[0] < 0.3 * errors[1] and errors[0] < 0.2 * errors[2]


def test_channels_without_inputs_are_rounded_all_the_same() -> None:
    weight, x = matrix(4, 16, 64), inputs(5, 256, 64)
    x[:, 10:20] = 0
    for moments in (x.T @ x, np.zeros((64, 64), np.float32)):
        found = unpacked(SearchedBlocks().packed(with_feedback(weight, moments, SIZE)), 64)
        assert np.isfinite(found).all()
        spans = np.maximum(weight.max(axis=1), 0) - np.minimum(weight.min(axis=1), 0)
        assert (np.abs(found - weight).max(axis=1) <= spans / 4).all()
