"""The bodies, in standard ONNX operators, of the CPU operators that take the weights of chosen layers."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.plugins.product_bodies import attribute, block_weight, first_rows, half_weight

_BOOL, _INT32 = int(ir.DataType.BOOL), int(ir.DataType.INT32)


def selected_block_matmul(
    op: Any, x: ir.Value, index: ir.Value, quantized: ir.Value, scales: ir.Value, minima: ir.Value
) -> Any:
    """Return the products with gathered matrices, dequantised."""
    scale = _chosen(op, scales, index)
    minimum = op.Expand(_chosen(op, minima, index), op.Shape(scale))
    groups = (_as_one(op, part) for part in (_chosen(op, quantized, index), scale, minimum))
    return _products(op, x, index, block_weight(op, *groups))


def selected_half_matmul(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value) -> Any:
    """Return the products with gathered matrices in float32."""
    return _products(op, x, index, half_weight(op, _as_one(op, _chosen(op, weights, index))))


def selected_float_matmul(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value) -> Any:
    """Return the products with gathered matrices."""
    return _of_those_with_one(op, index, op.MatMul(x, op.Transpose(_chosen(op, weights, index), perm=[0, 2, 1])))


def selected_norm(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value, epsilon: ir.Value) -> Any:
    """Return RMSNorm with a gathered weight."""
    between = op.Add(op.Mul(op.Shape(x, start=1, end=-1), 0), 1)
    shape = op.Concat(op.Shape(x, start=0, end=1), between, op.Shape(x, start=-1), axis=0)
    return _normed(op, x, op.Reshape(_chosen(op, weights, index), shape), epsilon)


def selected_add_norm(
    op: Any, x: ir.Value, index: ir.Value, weights: ir.Value, epsilon: ir.Value, residual: ir.Value
) -> Any:
    """Return the norm of the sum, and the sum."""
    total = op.Add(x, residual)
    return selected_norm(op, total, index, weights, epsilon), total


def choose_layer(
    op: Any,
    x: ir.Value,
    norm: ir.Value,
    epsilon: ir.Value,
    fc1: ir.Value,
    bias1: ir.Value,
    fc2: ir.Value,
    bias2: ir.Value,
    forced: ir.Value,
    before: ir.Value,
    seen: ir.Value,
) -> Any:
    """Return a hop's decision: index, any, seen, path, score, margin, gate."""
    inner = op.Add(op.MatMul(_normed(op, x, norm, epsilon), op.Transpose(fc1, perm=[1, 0])), bias1)
    scores = op.Add(op.MatMul(op.Mul(inner, op.Sigmoid(inner)), op.Transpose(fc2, perm=[1, 0])), bias2)
    scores, layers = op.Squeeze(scores, [1]), attribute(op, "layers")
    numbers = op.Range(0, op.Squeeze(op.Shape(bias2), [0]), 1)
    exits = op.And(op.GreaterOrEqual(numbers, layers), op.Equal(attribute(op, "exits"), 1))
    allowed = op.Or(op.And(op.Less(numbers, layers), op.Not(seen)), exits)
    masked = op.Where(allowed, scores, float("-inf"))
    # One more column, as TopK takes two; it puts the lower index first on ties.
    wide = op.Pad(masked, [0, 1], float("-inf"), [1])
    two, places = op.TopK(wide, [2], axis=1, sorted=1, _outputs=2)
    (best, _), (first, second) = (op.Split(part, axis=1, num_outputs=2, _outputs=2) for part in (places, two))
    told = op.Squeeze(op.Gather(forced, attribute(op, "hop"), axis=0), [0])
    choice = op.Where(op.Less(told, 0), best, told)
    some = op.Cast(op.ReduceMax(op.Cast(allowed, to=_INT32), [1], keepdims=1), to=_BOOL)
    asked = op.And(op.GreaterOrEqual(op.Unsqueeze(before, [1]), 0), some)
    goes = op.And(asked, op.Less(choice, layers))
    index = op.Where(goes, choice, -1)
    now = op.And(op.Equal(numbers, index), op.Equal(attribute(op, "reuses"), 0))
    of_path = (
        op.Where(asked, choice, -1),
        op.Where(asked, op.GatherElements(scores, choice, axis=1), 0.0),
        op.Where(asked, op.Sub(first, second), float("inf")),
    )
    gate = op.Where(asked, op.GatherElements(op.Softmax(masked, axis=1), choice, axis=1), 0.0)
    return (
        op.Squeeze(index, [1]),
        op.Cast(op.ReduceMax(op.Cast(goes, to=_INT32), keepdims=0), to=_BOOL),
        op.Or(seen, now),
        *(op.Unsqueeze(part, [0]) for part in of_path),
        op.Squeeze(gate, [1]),
    )


def _chosen(op: Any, stack: ir.Value, index: ir.Value) -> Any:
    """Return each row's part of a stack; a row without a layer takes that of layer 0."""
    return op.Gather(stack, op.Max(index, 0), axis=0)


def _as_one(op: Any, groups: ir.Value) -> Any:
    """Return groups of all rows [rows, groups, ..] as those of one matrix."""
    return op.Reshape(groups, op.Concat([-1], op.Shape(groups, start=2), axis=0))


def _products(op: Any, x: ir.Value, index: ir.Value, groups: ir.Value) -> Any:
    """Return x [rows, 1, K] times each row's matrix, of groups [rows * groups, 16, K]."""
    shape = op.Concat(op.Shape(index), [-1], op.Shape(groups, start=2), axis=0)
    matrices = op.Transpose(op.Reshape(groups, shape), perm=[1, 0, 2])
    return _of_those_with_one(op, index, op.MatMul(x, op.Transpose(first_rows(op, matrices), perm=[1, 2, 0])))


def _of_those_with_one(op: Any, index: ir.Value, y: ir.Value) -> Any:
    """Return y [rows, 1, N], zeros for rows without a layer."""
    return op.Where(op.Less(op.Unsqueeze(index, [1, 2]), 0), 0.0, y)


def _normed(op: Any, x: ir.Value, weight: ir.Value, epsilon: ir.Value) -> Any:
    mean = op.ReduceMean(op.Mul(x, x), [-1], keepdims=1)
    return op.Mul(op.Div(x, op.Sqrt(op.Add(mean, epsilon))), weight)


__all__ = [
    "choose_layer",
    "selected_add_norm",
    "selected_block_matmul",
    "selected_float_matmul",
    "selected_half_matmul",
    "selected_norm",
]
