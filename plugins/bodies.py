"""The operators' bodies in standard ONNX operators that TensorRT supports; they run if there is no plugin.

No constant has the type of a floating-point input, so a body works for float32, float16 and bfloat16.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

_BOOL, _INT32, _INT64 = (int(dtype) for dtype in (ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64))


def capacity_top_k(op: Any, scores: ir.Value, counts: ir.Value, slots: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return positions and validity by TopK of scores, then TopK of positions; TopK's rule decides ties."""
    lowest = float("-inf")
    candidate = op.Greater(scores, lowest)  # NaN is not greater than anything
    capacity, length = op.Shape(slots), op.Shape(scores, start=1, end=2)
    _, best = op.TopK(op.Where(candidate, scores, lowest), capacity, axis=1, sorted=1, _outputs=2)
    candidates = op.ReduceSum(op.Cast(candidate, to=_INT64), [1], keepdims=1)
    valid = op.Less(slots, op.Min(op.Unsqueeze(counts, [1]), candidates))
    # The key sorts positions that are not valid after the others; all keys differ.
    key = op.Where(valid, best, op.Add(best, length))
    ordered, _ = op.TopK(key, capacity, axis=1, largest=0, sorted=1, _outputs=2)
    return op.Mod(ordered, length), op.Cast(valid, to=_INT32)


def gated_scatter_add(
    op: Any, residual: ir.Value, update: ir.Value, gate: ir.Value, positions: ir.Value, valid: ir.Value
) -> ir.Value:
    """Return the sum by gather, add and scatter, because TensorRT supports scatter with reduction ``none`` only."""
    rows = op.Range(0, op.Squeeze(op.Shape(residual, start=0, end=1), [0]), 1)
    place = op.Add(positions, op.Mul(op.Unsqueeze(rows, [1]), op.Shape(residual, start=1, end=2)))
    line = op.Concat([-1], op.Shape(residual, start=2, end=3), axis=0)
    flat = op.Reshape(residual, line)
    before = op.Gather(flat, place, axis=0)
    after = op.Add(before, op.Mul(op.Unsqueeze(gate, [2]), update))
    # Slots that are not valid write back what they read, since their update may be NaN.
    after = op.Where(op.Cast(op.Unsqueeze(valid, [2]), to=_BOOL), after, before)
    scattered = op.ScatterND(flat, op.Reshape(place, [-1, 1]), op.Reshape(after, line))
    output: ir.Value = op.Reshape(scattered, op.Shape(residual))
    return output


def ragged_kv_append(op: Any, cache: ir.Value, new: ir.Value, write_index: ir.Value, count: ir.Value) -> ir.Value:
    """Return the cache by selecting, for every entry, the old or the new value."""
    added = op.Shape(new, start=2, end=3)
    entries = op.Range(0, op.Squeeze(op.Shape(cache, start=2, end=3), [0]), 1)
    source = op.Sub(entries, op.Unsqueeze(write_index, [1]))
    written = op.And(op.GreaterOrEqual(source, 0), op.Less(source, op.Min(op.Unsqueeze(count, [1]), added)))
    source = op.Max(op.Min(source, op.Sub(added, 1)), 0)
    rows_and_heads = op.Shape(cache, start=0, end=2)
    line = op.Range(0, op.ReduceProd(rows_and_heads, keepdims=0), 1)
    first = op.Mul(op.Unsqueeze(op.Reshape(line, rows_and_heads), [2]), added)
    flat = op.Reshape(new, op.Concat([-1], op.Shape(new, start=3, end=4), axis=0))
    values = op.Gather(flat, op.Add(first, op.Unsqueeze(source, [1])), axis=0)
    output: ir.Value = op.Where(op.Unsqueeze(written, [1, 3]), values, cache)
    return output


def selected_matmul(op: Any, x: ir.Value, weight: ir.Value, index: ir.Value) -> ir.Value:
    """Return the products with a gathered matrix per token; a token without one uses matrix 0, then gets zeros."""
    product = op.MatMul(op.Gather(weight, op.Max(index, 0), axis=0), op.Unsqueeze(x, [2]))
    none = op.Less(op.Unsqueeze(index, [1]), 0)
    output: ir.Value = op.Where(none, op.CastLike(0, x), op.Squeeze(product, [2]))
    return output


__all__ = ["capacity_top_k", "gated_scatter_add", "ragged_kv_append", "selected_matmul"]
