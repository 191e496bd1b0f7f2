"""Attention by dynexport's CPU operator CachedAttention (docs/plugins.md)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.lowering.target import AttentionInputs
from dynexport.plugins.attention import MOST_CHANNELS, cached_attention
from dynexport.runtime.bundle.errors import DynexportError

# Tables of the angles of every position are computed when a session loads; a limit for their size.
_LARGEST_TABLES = 256 << 20


def rotates(architecture: Architecture) -> bool:
    """Return whether the operator rotates queries and keys, by tables of every position."""
    positions = architecture.positions
    return isinstance(positions, Rotary) and architecture.max_length * positions.dim * 4 <= _LARGEST_TABLES


def attend(op: Any, packed: ir.Value, inputs: AttentionInputs) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append and attend.

    Args:
        op: builder of the graph.
        packed: float32 [B, S, (heads + 2 kv_heads) * cache_head_dim], queries, keys and values.
        inputs: the other inputs.

    Returns:
        The output float32 [B, S, heads * cache_head_dim], present_key and present_value.

    Raises:
        DynexportError: for heads with more channels than the operator takes.
    """
    if inputs.head_dim > MOST_CHANNELS:
        raise DynexportError(
            f"--plugins: expected heads of at most {MOST_CHANNELS} channels, found {inputs.head_dim}; leave out "
            "--plugins"
        )
    assert inputs.total_length is not None
    one = _constant(op, np.ones((1, 1, 1, 1), np.float32))
    rotary = inputs.rotary or (
        *(_constant(op, np.ones((1, 0), np.float32)) for _ in "cs"),
        _constant(op, np.zeros((1, 1), np.int64)),
    )
    bias = _constant(op, np.zeros((1, 1, 1, 1), np.float32)) if inputs.bias is None else inputs.bias
    return cached_attention(
        op,
        packed,
        inputs.past_key,
        inputs.past_value,
        inputs.last_index,
        inputs.total_length,
        *rotary,
        bias,
        one,
        one,
        heads=inputs.heads,
        kv_heads=inputs.kv_heads,
        scale=inputs.scale,
        softcap=inputs.softcap or 0.0,
    )


def _constant(op: Any, values: Any) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.tensor(values))
    return made


__all__ = ["attend", "rotates"]
