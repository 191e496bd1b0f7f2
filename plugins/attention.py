"""The CPU operator for attention: it rotates queries and keys, appends to a cache in place, and attends to it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from dynexport.plugins.attention_body import cached_attention as body
from dynexport.plugins.schema import DOMAIN

OPSET = 24
NAME = "CachedAttention"
INPUTS = (
    "packed",
    "past_key",
    "past_value",
    "last_index",
    "total_length",
    "cos",
    "sin",
    "position_ids",
    "bias",
    "key_scale",
    "value_scale",
)
_ATTRIBUTES = {
    "num_heads": ir.AttributeType.INT,
    "kv_num_heads": ir.AttributeType.INT,
    "scale": ir.AttributeType.FLOAT,
    "softcap": ir.AttributeType.FLOAT,
}
# Channels per head of the caches are a multiple of this.
CHANNELS = 8
MOST_CHANNELS = 1024


def cached_attention(
    op: Any, *inputs: ir.Value, heads: int, kv_heads: int, scale: float, softcap: float
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Append to a cache, and attend to it causally.

    Args:
        op: the builder of a graph, subgraph or function.
        inputs: in this order:
            packed float32 [B, S, (heads + 2 kv_heads) * D], queries, then keys, then values of S new tokens per row;
            past_key T [B, kv_heads, M, D], float32, float16 or int8; D is a multiple of 8;
            past_value, likewise;
            last_index int32 [B], a row's last entry after the append: its tokens see the entries up to their own;
            total_length int32, the longest row's entries after the append;
            cos float32 [positions, R / 2], of which rows are the angles that the first R channels of queries and keys
            are rotated by; R may be 0;
            sin, likewise;
            position_ids int64 [B, S], rows of cos and sin; [1, 1] where R is 0;
            bias float32, broadcast to [B, heads, S, total_length] and added to the scores; one zero for none;
            key_scale float32, broadcast to [1, kv_heads, 1, D]: for int8, an entry is its integer times the scale; ones
            for other types;
            value_scale, likewise.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        scale: factor of the scores.
        softcap: bound c of the scores, c * tanh(score / c), before the bias; 0 for none.

    Returns:
        The output float32 [B, S, heads * D], and the caches with the new entries.
    """
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scale), "softcap": float(softcap)}
    output, *present = getattr(op, NAME)(*inputs, _domain=DOMAIN, _outputs=3, **attributes)
    # The builder does not infer types for an unknown domain.
    output.type = ir.TensorType(ir.DataType.FLOAT)
    for made, past in zip(present, inputs[1:3], strict=True):
        made.type, made.shape = past.type, past.shape
    return output, present[0], present[1]


def function() -> ir.Function:
    """Return the operator's body as an ONNX local function."""
    made: ir.Function = build_function(
        body,
        [ir.Value(name=name) for name in INPUTS],
        domain=DOMAIN,
        name=NAME,
        attributes=[ir.Attr(name, kind, None) for name, kind in _ATTRIBUTES.items()],
        opset_imports={"": OPSET},
    )
    return made


__all__ = ["CHANNELS", "INPUTS", "MOST_CHANNELS", "NAME", "cached_attention", "function"]
