"""Products and lookups of a checkpoint's own blocks, by ONNX Runtime's MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from dynexport.exporter.lowering.blocks import Blocked, SumColumns

MICROSOFT = "com.microsoft"
# int8 activations, as onnxruntime-genai chooses on CPU: the level with VNNI and dot-product kernels.
ACCURACY_LEVEL = 4
_SUFFIXES = ("_quantized", "_scales", "_zero_points")


def multiply(
    op: Any,
    x: ir.Value,
    parts: Mapping[str, ir.Value],
    rows: int,
    columns: int,
    storage: Blocked,
    *,
    accuracy_level: int,
) -> ir.Value:
    """Return x W^T of x [.., columns]: [.., rows]."""
    sums = storage.sums(columns)
    if sums is not None:
        x = _with_sums(op, x, sums)
    return op.MatMulNBits(
        x,
        *(parts[suffix] for suffix in _SUFFIXES if suffix in parts),
        _domain=MICROSOFT,
        N=rows,
        K=columns + (0 if sums is None else sums.width),
        bits=storage.bits,
        block_size=storage.block_size,
        accuracy_level=accuracy_level,
    )


def look_up(
    op: Any, indices: ir.Value, parts: Mapping[str, ir.Value], shape: tuple[int, int], storage: Blocked
) -> ir.Value:
    """Return the rows of W [N, K] at indices int64 [B, S]: [B, S, K]."""
    rows, columns = shape
    sums = storage.sums(columns)
    blocks = columns // storage.block_size + (0 if sums is None else sums.blocks)
    table = op.Reshape(parts["_quantized"], [rows, blocks * storage.block_size * storage.bits // 8])
    zeros = [parts["_zero_points"]] if "_zero_points" in parts else []
    y = op.GatherBlockQuantized(
        table,
        indices,
        parts["_scales"],
        *zeros,
        _domain=MICROSOFT,
        bits=storage.bits,
        block_size=storage.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    return y if sums is None else _with_offsets(op, y, columns, sums)


def _with_sums(op: Any, x: ir.Value, sums: SumColumns) -> ir.Value:
    """Return x followed by the sums of its blocks; products with the same input share them."""
    graph, known = op.builder.graph, x.meta.setdefault("block_sums", {})
    place = (sums.size, sums.copies)
    if known.get(place, (None, None))[0] is not graph:
        lead = [0] * (2 if x.shape is None else len(x.shape) - 1)
        by_block = op.Reshape(x, [*lead, sums.count, sums.size])
        total = op.ReduceSum(by_block, [-1], keepdims=0)
        known[place] = (graph, op.Concat(x, *[total] * sums.copies, axis=-1))
    wider: ir.Value = known[place][1]
    return wider


def _with_offsets(op: Any, y: ir.Value, columns: int, sums: SumColumns) -> ir.Value:
    """Add to each block of a row what the columns of the block's sum hold."""
    spare = sums.blocks * sums.size - sums.width
    sizes = [columns, sums.width] + ([spare] if spare else [])
    values, extra, *_ = op.Split(y, sizes, axis=-1, _outputs=len(sizes))
    offsets = op.ReduceSum(op.Reshape(extra, [0, 0, sums.copies, sums.count]), [2], keepdims=0)
    by_block = op.Reshape(values, [0, 0, sums.count, sums.size])
    return op.Reshape(op.Add(by_block, op.Unsqueeze(offsets, [-1])), [0, 0, columns])


__all__ = ["ACCURACY_LEVEL", "MICROSOFT", "look_up", "multiply"]
