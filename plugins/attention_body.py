"""The body of CachedAttention in standard ONNX operators: it runs where there is no library of kernels."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

_FLOAT, _INT64 = int(ir.DataType.FLOAT), int(ir.DataType.INT64)


def cached_attention(
    op: Any,
    packed: ir.Value,
    past_key: ir.Value,
    past_value: ir.Value,
    last_index: ir.Value,
    total_length: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    position_ids: ir.Value,
    bias: ir.Value,
    key_scale: ir.Value,
    value_scale: ir.Value,
) -> tuple[Any, Any, Any]:
    """Return the output, present_key and present_value."""
    channels, tokens = op.Shape(past_key, start=3, end=4), op.Shape(packed, start=1, end=2)
    # [B, heads + 2 kv_heads, S, channels]
    by_head = op.Transpose(op.Reshape(packed, op.Concat([0, 0, -1], channels, axis=0)), perm=[0, 2, 1, 3])
    heads, kv_heads = _integer(op, "num_heads"), _integer(op, "kv_num_heads")
    keys_end = op.Add(heads, kv_heads)
    query = _rotated(op, op.Slice(by_head, [0], heads, [1]), cos, sin, position_ids, channels)
    key = _rotated(op, op.Slice(by_head, heads, keys_end, [1]), cos, sin, position_ids, channels)
    value = op.Slice(by_head, keys_end, op.Add(keys_end, kv_heads), [1])
    # int64 [B]: where a row's first new entry goes
    first = op.Sub(op.Add(op.Cast(last_index, to=_INT64), 1), tokens)
    present_key = op.TensorScatter(past_key, _stored(op, key, key_scale, past_key), first, axis=2)
    present_value = op.TensorScatter(past_value, _stored(op, value, value_scale, past_value), first, axis=2)
    total = op.Unsqueeze(op.Cast(total_length, to=_INT64), [0])
    keys, values = _entries(op, present_key, key_scale, total), _entries(op, present_value, value_scale, total)
    # [B, kv_heads, group, S, channels]
    grouped = op.Reshape(query, op.Concat([0], kv_heads, [-1], tokens, channels, axis=0), allowzero=0)
    scores = op.Mul(op.MatMul(grouped, op.Transpose(keys, perm=[0, 1, 2, 4, 3])), _number(op, "scale"))
    scores = op.Reshape(_capped(op, scores), op.Concat([0], heads, tokens, total, axis=0))
    weights = op.Softmax(_masked(op, op.Add(scores, bias), first, tokens, total), axis=-1)
    shared = op.Reshape(weights, op.Concat([0], kv_heads, [-1], tokens, total, axis=0))
    output = op.Reshape(op.MatMul(shared, values), op.Concat([0], heads, tokens, channels, axis=0))
    return op.Reshape(op.Transpose(output, perm=[0, 2, 1, 3]), [0, 0, -1]), present_key, present_value


def _integer(op: Any, name: str) -> Any:
    """Return an integer attribute of the call as int64 [1]."""
    return op.Unsqueeze(op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT)), [0])


def _number(op: Any, name: str) -> Any:
    return op.Constant(value_float=ir.RefAttr("value_float", name, ir.AttributeType.FLOAT))


def _rotated(op: Any, x: Any, cos: ir.Value, sin: ir.Value, position_ids: ir.Value, channels: Any) -> Any:
    """Rotate the channels that the tables cover: a pair is channel i and i + half."""
    half = op.Shape(cos, start=1, end=2)
    whole = op.Add(half, half)
    a, b = op.Slice(x, [0], half, [3]), op.Slice(x, half, whole, [3])
    c, s = (op.Unsqueeze(op.Gather(table, position_ids, axis=0), [1]) for table in (cos, sin))
    turned = op.Sub(op.Mul(a, c), op.Mul(b, s)), op.Add(op.Mul(b, c), op.Mul(a, s))
    return op.Concat(*turned, op.Slice(x, whole, channels, [3]), axis=3)


def _stored(op: Any, x: Any, scale: ir.Value, cache: ir.Value) -> Any:
    """Return entries in the type of a cache; integers are rounded, halves to even."""
    scaled = op.Div(x, scale)
    integers = op.Equal(op.Cast(op.CastLike(op.Constant(value_float=0.5), cache), to=_FLOAT), 0.0)
    return op.CastLike(op.Where(integers, op.Clip(op.Round(scaled), -128.0, 127.0), scaled), cache)


def _entries(op: Any, present: Any, scale: ir.Value, total: Any) -> Any:
    """Return a cache's entries as float32 [B, kv_heads, 1, T, channels]."""
    found = op.Mul(op.Cast(op.Slice(present, [0], total, [2]), to=_FLOAT), scale)
    return op.Unsqueeze(found, [2])


def _capped(op: Any, scores: Any) -> Any:
    """Return softcap * tanh(score / softcap), or the scores for a softcap of 0."""
    cap = _number(op, "softcap")
    capped = op.Mul(op.Tanh(op.Div(scores, op.Max(cap, 1e-30))), cap)
    return op.Where(op.Greater(cap, 0.0), capped, scores)


def _masked(op: Any, scores: Any, first: Any, tokens: Any, total: Any) -> Any:
    """Hide the entries behind each token's own."""
    own = op.Add(op.Unsqueeze(first, [1]), op.Range(0, op.Squeeze(tokens, [0]), 1))  # [B, S]
    seen = op.LessOrEqual(op.Range(0, op.Squeeze(total, [0]), 1), op.Unsqueeze(own, [1, 3]))
    return op.Where(seen, scores, float("-inf"))


__all__ = ["cached_attention"]
