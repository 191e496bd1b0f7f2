"""Models of one CachedAttention, random calls, and what the operator means, in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from dynexport.plugins.attention import INPUTS, cached_attention
from dynexport.plugins.graph import add_functions

Array = NDArray[Any]


@dataclass(frozen=True)
class AttentionCase:
    """One call."""

    inputs: dict[str, Array]
    heads: int
    kv_heads: int
    scale: float
    softcap: float

    @classmethod
    def drawn(cls, random: np.random.Generator, **fixed: Any) -> AttentionCase:
        """A call of a random kind and shape: rows of different lengths, with and without all that is optional."""

        def choose(name: str, choices: list[Any]) -> Any:
            return fixed[name] if name in fixed else choices[random.integers(len(choices))]

        kv_heads, group, rows = (
            choose("kv_heads", [1, 2, 3]),
            choose("group", [1, 2, 3, 4, 5, 8]),
            choose("rows", [1, 2, 3]),
        )
        channels = choose("channels", [8, 16, 24, 32, 64, 80, 96, 128])
        tokens = choose("tokens", [1, 1, 2, 3, 8, 9, 17, 40, 130])
        dtype = choose("dtype", [np.float32, np.float16, np.int8])
        past = random.integers(0, choose("past", [1, 5, 70, 300]), rows)
        slots, total = int(past.max()) + tokens + int(random.integers(0, 9)), int(past.max()) + tokens
        rotated = 2 * int(random.integers(0, channels // 2 + 1)) if random.random() < 0.8 else 0
        heads = kv_heads * group
        packed = random.normal(size=(rows, tokens, (heads + 2 * kv_heads) * channels)).astype(np.float32)
        shape = (rows, kv_heads, slots, channels)
        integers = dtype == np.int8
        scales = [
            (drawn_scale(random, kv_heads, channels) if integers else np.ones((1, 1, 1, 1), np.float32)) for _ in "kv"
        ]
        caches = [
            random.integers(-128, 128, shape).astype(dtype) if integers else random.normal(size=shape).astype(dtype)
            for _ in "kv"
        ]
        inputs = {
            "packed": packed,
            "past_key": caches[0],
            "past_value": caches[1],
            "last_index": (past + tokens - 1).astype(np.int32),
            "total_length": np.array(total, np.int32),
            **rotation(random, rows, tokens, rotated),
            "bias": drawn_bias(random, rows, heads, tokens, total)
            if choose("bias", [0, 1])
            else np.zeros((1, 1, 1, 1), np.float32),
            "key_scale": scales[0],
            "value_scale": scales[1],
        }
        return cls(inputs, heads, kv_heads, choose("scale", [0.125, 0.3]), choose("softcap", [0.0, 0.0, 3.0]))


def drawn_scale(random: np.random.Generator, kv_heads: int, channels: int) -> Array:
    """Scales by which most new entries are within -128..127, and some are not."""
    return (random.uniform(0.3, 3, (1, kv_heads, 1, channels)) / 127).astype(np.float32)


def rotation(random: np.random.Generator, rows: int, tokens: int, rotated: int) -> dict[str, Array]:
    if not rotated:
        return {
            "cos": np.ones((1, 0), np.float32),
            "sin": np.ones((1, 0), np.float32),
            "position_ids": np.zeros((1, 1), np.int64),
        }
    angles = random.uniform(-3, 3, (400, rotated // 2))
    positions = random.integers(0, 400, (rows, tokens))
    return {
        "cos": np.cos(angles).astype(np.float32),
        "sin": np.sin(angles).astype(np.float32),
        "position_ids": positions,
    }


def drawn_bias(random: np.random.Generator, rows: int, heads: int, tokens: int, total: int) -> Array:
    """A bias of a random broadcast; sometimes it hides entries, as windows do, but never all of a token."""
    shape = [size if random.random() < 0.5 else 1 for size in (rows, heads, tokens)]
    bias = random.normal(size=(*shape, total)).astype(np.float32)
    if random.random() < 0.5:
        bias[..., 1:][random.random((*shape, total - 1)) < 0.5] = -1e30
    return bias


def expected(case: AttentionCase) -> tuple[Array, Array, Array]:
    """Output, present_key and present_value, in float64 apart from the types of the caches."""
    given = case.inputs
    rows, kv_heads, _, channels = given["past_key"].shape
    tokens, group = given["packed"].shape[1], case.heads // kv_heads
    packed = given["packed"].astype(np.float64).reshape(rows, tokens, -1, channels)
    query, key, value = np.split(packed, [case.heads, case.heads + kv_heads], axis=2)
    query, key = turned(query, given), turned(key, given)
    present = given["past_key"].copy(), given["past_value"].copy()
    scales = given["key_scale"], given["value_scale"]
    output = np.zeros((rows, tokens, case.heads, channels))
    for b in range(rows):
        first = int(given["last_index"][b]) + 1 - tokens
        seen = first + tokens
        for kept, new, scale in zip(present, (key, value), scales, strict=True):
            kept[b, :, first:seen] = stored(new[b].swapaxes(0, 1), scale[0], kept.dtype)
        keys, values = (
            np.repeat(kept[b, :, :seen].astype(np.float64) * scale[0], group, axis=0)
            for kept, scale in zip(present, scales, strict=True)
        )
        scores = query[b].swapaxes(0, 1) @ keys.swapaxes(1, 2) * case.scale
        if case.softcap:
            scores = case.softcap * np.tanh(scores / case.softcap)
        everywhere = (rows, case.heads, tokens, int(given["total_length"]))
        scores += np.broadcast_to(given["bias"], everywhere)[b, :, :, :seen]
        scores[:, np.arange(seen) > first + np.arange(tokens)[:, None]] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        output[b] = (weights @ values / weights.sum(axis=-1, keepdims=True)).swapaxes(0, 1)
    return output.reshape(rows, tokens, -1), *present


def turned(x: Array, given: dict[str, Array]) -> Array:
    half = given["cos"].shape[1]
    cos, sin = (given[name].astype(np.float64)[given["position_ids"]][:, :, None] for name in ("cos", "sin"))
    a, b = x[..., :half], x[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]], axis=-1)


def stored(x: Array, scale: Array, dtype: Any) -> Array:
    return np.clip(np.rint(x / scale), -128, 127).astype(dtype) if dtype == np.int8 else x.astype(dtype)


def attention_model(case: AttentionCase) -> bytes:
    """A model of one call, all of whose tensors are inputs of any size."""
    dtypes = tuple((name, ir.DataType.from_numpy(case.inputs[name].dtype), case.inputs[name].ndim) for name in INPUTS)
    return _model(dtypes, case.heads, case.kv_heads, case.scale, case.softcap)


@cache
def _model(
    inputs: tuple[tuple[str, ir.DataType, int], ...], heads: int, kv_heads: int, scale: float, softcap: float
) -> bytes:
    made = ir.Graph([], [], nodes=[], name="attention", opset_imports={"": 24})
    for name, dtype, rank in inputs:
        shape = ir.Shape([f"{name}{i}" for i in range(rank)])
        made.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=shape))
    op = GraphBuilder(made).op
    outputs = cached_attention(op, *made.inputs, heads=heads, kv_heads=kv_heads, scale=scale, softcap=softcap)
    for value, name in zip(outputs, ("output", "present_key", "present_value"), strict=True):
        value.name = name
        made.outputs.append(value)
    whole = ir.Model(made, ir_version=11)
    add_functions(whole)
    return ir.to_proto(whole).SerializeToString()


__all__ = ["AttentionCase", "attention_model", "expected"]
