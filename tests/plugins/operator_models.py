"""Models of one operator each, inputs for them, and what the operators mean, in plain numpy and Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from dynexport.plugins import graph
from dynexport.plugins.operators import OPERATORS
from dynexport.plugins.schema import T

CALLS: dict[str, Callable[..., Any]] = {
    "CapacityTopK": graph.capacity_top_k,
    "GatedScatterAdd": graph.gated_scatter_add,
    "RaggedKVAppend": graph.ragged_kv_append,
    "SelectedMatMul": graph.selected_matmul,
}
BY_NAME = {operator.name: operator for operator in OPERATORS}
Arrays = dict[str, NDArray[Any]]


def model(name: str, dtype: ir.DataType = ir.DataType.FLOAT, **sizes: int) -> onnx.ModelProto:
    """A model of one call; dimensions are symbols but for those in ``sizes``."""
    operator = BY_NAME[name]
    made = ir.Graph([], [], nodes=[], name=name, opset_imports={"": 24})
    for tensor in operator.inputs:
        own = dtype if tensor.dtype == T else tensor.dtype
        shape = ir.Shape([sizes.get(letter, letter) for letter in tensor.dims])
        made.inputs.append(ir.Value(name=tensor.name, type=ir.TensorType(own), shape=shape))
    outputs = CALLS[name](GraphBuilder(made).op, *made.inputs)
    made.outputs.extend(outputs if isinstance(outputs, tuple) else (outputs,))
    for output, tensor in zip(made.outputs, operator.outputs, strict=True):
        output.name = tensor.name
    whole = ir.Model(made, ir_version=11)
    graph.add_functions(whole)
    return ir.to_proto(whole)


@cache
def session(name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> onnxruntime.InferenceSession:
    """The body in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model(name, dtype).SerializeToString(), options)


def oracle(name: str, arrays: Arrays) -> list[NDArray[Any]]:
    """The operator by its description, one element at a time, in float64."""
    function: Callable[..., Any] = globals()[f"_{name}"]
    outputs = function(**arrays)
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def _CapacityTopK(scores: NDArray[Any], counts: NDArray[Any], slots: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    positions = np.zeros((len(scores), len(slots)), np.int64)
    valid = np.zeros(positions.shape, np.int32)
    for b, row in enumerate(scores.tolist()):
        candidates = [i for i, score in enumerate(row) if not math.isnan(score) and score > -math.inf]
        best = sorted(candidates, key=lambda i: (-row[i], i))[: max(0, min(int(counts[b]), len(slots)))]
        chosen = set(best)
        others = [i for i in range(len(row)) if i not in chosen]
        positions[b] = (sorted(best) + others)[: len(slots)]
        valid[b, : len(best)] = 1
    return positions, valid


def _GatedScatterAdd(
    residual: NDArray[Any], update: NDArray[Any], gate: NDArray[Any], positions: NDArray[Any], valid: NDArray[Any]
) -> NDArray[Any]:
    output = residual.astype(np.float64)
    for b, k in np.ndindex(*positions.shape):
        if valid[b, k]:
            output[b, positions[b, k]] += float(gate[b, k]) * update[b, k].astype(np.float64)
    return output


def _RaggedKVAppend(
    cache: NDArray[Any], new: NDArray[Any], write_index: NDArray[Any], count: NDArray[Any]
) -> NDArray[Any]:
    output = cache.copy()
    for b, j in np.ndindex(new.shape[0], new.shape[2]):
        entry = int(write_index[b]) + j
        if j < count[b] and 0 <= entry < cache.shape[2]:
            output[b, :, entry] = new[b, :, j]
    return output


def _SelectedMatMul(x: NDArray[Any], weight: NDArray[Any], index: NDArray[Any]) -> NDArray[Any]:
    products = np.zeros((len(x), weight.shape[1]))
    for n in np.flatnonzero(index >= 0):
        products[n] = weight[index[n]].astype(np.float64) @ x[n].astype(np.float64)
    return products


def draw(name: str, sizes: dict[str, int], seed: int, dtype: Any = np.float32) -> Arrays:
    """Inputs with ties, masked scores, and values that are not to be looked at."""
    random = np.random.default_rng(seed)

    def normal(dims: str) -> NDArray[Any]:
        return random.normal(size=[sizes[letter] for letter in dims]).astype(dtype)

    if name == "CapacityTopK":
        rows, length = sizes["B"], sizes["S"]
        pool = np.array([0.0, -0.0, 1.0, 1e-40, -1.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38], np.float32)
        few = random.choice(pool, (rows, length))
        scores = np.where(random.random((rows, 1)) < 0.5, few, random.normal(size=(rows, length)))
        counts = random.integers(-1, length + 2, rows)
        return {"scores": scores.astype(np.float32), "counts": counts, "slots": np.arange(sizes["K"])}
    if name == "GatedScatterAdd":
        shape = (sizes["B"], sizes["K"])
        places = [random.permutation(sizes["S"])[: sizes["K"]] for _ in range(sizes["B"])]
        valid = random.integers(0, 2, shape).astype(np.int32)
        update = normal("BKH")
        update[valid == 0] = np.nan
        drawn = {"residual": normal("BSH"), "update": update, "gate": normal("BK")}
        return {**drawn, "positions": np.array(places, np.int64).reshape(shape), "valid": valid}
    if name == "RaggedKVAppend":
        write_index = random.integers(-2, sizes["M"] + 2, sizes["B"])
        count = random.integers(-1, sizes["K"] + 2, sizes["B"])
        return {"cache": normal("BhMD"), "new": normal("BhKD"), "write_index": write_index, "count": count}
    index = random.integers(-1, sizes["L"], sizes["N"])
    tokens = normal("NK")
    tokens[index < 0] = np.nan
    return {"x": tokens, "weight": normal("LJK"), "index": index}


def agree(name: str, found: Sequence[NDArray[Any]], arrays: Arrays, *, tolerance: float) -> None:
    """Hold outputs to the oracle: floats to a relative and absolute tolerance, everything else exactly."""
    wanted = oracle(name, arrays)
    if name == "CapacityTopK":
        _same_choice(found[0], found[1], wanted[0], wanted[1], arrays["scores"].shape[1])
        return
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.astype(np.float64), other.astype(np.float64), rtol=tolerance, atol=tolerance)


def _same_choice(
    positions: NDArray[Any], valid: NDArray[Any], right: NDArray[Any], right_valid: NDArray[Any], length: int
) -> None:
    np.testing.assert_array_equal(valid, right_valid)
    np.testing.assert_array_equal(positions[valid == 1], right[right_valid == 1])
    # Which positions fill the other slots is left open, but not that they differ.
    assert all(len(set(row)) == len(row) and set(row) <= set(range(length)) for row in positions.tolist())


__all__ = ["BY_NAME", "CALLS", "Arrays", "agree", "draw", "model", "oracle", "session"]
