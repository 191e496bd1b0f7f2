"""The bodies of the CPU operators in standard ONNX operators: they run where there is no library of kernels.

What depends on weights only is computed when a session loads, so that a body then costs a product in float32.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

_FLOAT, _UINT8 = int(ir.DataType.FLOAT), int(ir.DataType.UINT8)


def block_matmul(op: Any, x: ir.Value, quantized: ir.Value, scales: ir.Value, minima: ir.Value) -> Any:
    """Return the product with the dequantised matrix."""
    return _product(op, x, block_weight(op, quantized, scales, minima))


def block_weight(op: Any, quantized: ir.Value, scales: ir.Value, minima: ir.Value) -> Any:
    """Return the dequantised groups of a matrix, float32 [N / 16, 16, K]."""
    integers = op.Reshape(op.Transpose(_unpacked(op, quantized), perm=[0, 4, 1, 2, 3, 5]), [0, 0, 0, -1])
    scale, minimum = (op.Transpose(op.Cast(part, to=_FLOAT), perm=[0, 2, 1]) for part in (scales, minima))
    return op.Reshape(_dequantised(op, integers, scale, minimum), [0, 0, -1])


def block_gather(op: Any, indices: ir.Value, quantized: ir.Value, scales: ir.Value, minima: ir.Value) -> Any:
    """Return rows, dequantised after they were gathered."""
    chosen = op.Gather(_rows(op, op.Transpose(quantized, perm=[0, 3, 1, 2, 4])), indices, axis=0)
    integers = _unpacked_rows(op, chosen, indices)
    scale, minimum = (
        op.Gather(_rows(op, op.Transpose(part, perm=[0, 2, 1])), indices, axis=0)
        for part in (scales, op.Expand(minima, op.Shape(scales)))
    )
    values = _dequantised(op, integers, op.Cast(scale, to=_FLOAT), op.Cast(minimum, to=_FLOAT))
    columns = op.ReduceProd(op.Shape(integers, start=-2), keepdims=1)
    return op.Reshape(values, op.Concat(op.Shape(indices), columns, axis=0), allowzero=1)


def half_matmul(op: Any, x: ir.Value, weights: ir.Value) -> Any:
    """Return the product with the matrix in float32."""
    return _product(op, x, half_weight(op, weights))


def half_weight(op: Any, weights: ir.Value) -> Any:
    """Return the groups of a matrix in float32, [N / 16, 16, K]."""
    return op.Reshape(op.Transpose(op.Cast(weights, to=_FLOAT), perm=[0, 2, 1, 3]), [0, 0, -1])


def half_gather(op: Any, indices: ir.Value, weights: ir.Value) -> Any:
    """Return rows in float32."""
    columns = op.Mul(op.Shape(weights, start=1, end=2), op.Shape(weights, start=3, end=4))
    rows = op.Reshape(op.Transpose(weights, perm=[0, 2, 1, 3]), op.Concat([-1], columns, axis=0))
    return op.Cast(op.Gather(first_rows(op, rows), indices, axis=0), to=_FLOAT)


def attribute(op: Any, name: str) -> Any:
    """Return an integer attribute of the call as int64 [1]."""
    value = op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
    return op.Unsqueeze(value, [0])


def _unpacked(op: Any, packed: ir.Value) -> Any:
    """Return the integers of bytes [.., 16, 4] as uint8 [.., 8 / bits, 16, 4]."""
    return _shifted(op, op.Unsqueeze(packed, [3]), op.Unsqueeze(_shifts(op), [1, 2]))


def _unpacked_rows(op: Any, chosen: ir.Value, indices: ir.Value) -> Any:
    """Return the integers of chosen rows [.., blocks, chunks, 4] as uint8 [.., blocks, size]."""
    integers = _shifted(op, op.Unsqueeze(chosen, [-2]), op.Unsqueeze(_shifts(op), [1]))
    size = op.ReduceProd(op.Shape(integers, start=-3), keepdims=1)
    shape = op.Concat(op.Shape(indices), op.Shape(chosen, start=-3, end=-2), size, axis=0)
    return op.Reshape(integers, shape, allowzero=1)


def _shifts(op: Any) -> Any:
    """Return 0, or for 4 bits 0 and 4, as uint8 [8 / bits]."""
    both = op.Cast(op.Constant(value_ints=[0, 4]), to=_UINT8)
    return op.Slice(both, [0], op.Div([8], attribute(op, "bits")), [0])


def _shifted(op: Any, packed: ir.Value, shifts: ir.Value) -> Any:
    unused = op.Cast(op.Sub([8], attribute(op, "bits")), to=_UINT8)
    mask = op.BitShift(op.Cast(op.Constant(value_ints=[255]), to=_UINT8), unused, direction="RIGHT")
    return op.BitwiseAnd(op.BitShift(packed, shifts, direction="RIGHT"), mask)


def _dequantised(op: Any, integers: ir.Value, scale: ir.Value, minimum: ir.Value) -> Any:
    """Return scale * (q - zero) + minimum, for q [.., size] and one scale and minimum per block [..]."""
    zero = op.Cast(attribute(op, "zero"), to=_FLOAT)
    centred = op.Sub(op.Cast(integers, to=_FLOAT), zero)
    return op.Add(op.Mul(centred, op.Unsqueeze(scale, [-1])), op.Unsqueeze(minimum, [-1]))


def _rows(op: Any, groups: ir.Value) -> Any:
    """Return [groups, 16, ..] as [N, ..], without the rows that fill the last group."""
    return first_rows(op, op.Reshape(groups, op.Concat([-1], op.Shape(groups, start=2), axis=0)))


def first_rows(op: Any, rows: ir.Value) -> Any:
    """Return the first N rows."""
    return op.Slice(rows, [0], attribute(op, "N"), [0])


def _product(op: Any, x: ir.Value, groups: ir.Value) -> Any:
    """Return x W^T for a matrix [groups, 16, K] of at least N rows."""
    return op.MatMul(x, op.Transpose(_rows(op, groups), perm=[1, 0]))


__all__ = [
    "attribute",
    "block_gather",
    "block_matmul",
    "block_weight",
    "first_rows",
    "half_gather",
    "half_matmul",
    "half_weight",
]
