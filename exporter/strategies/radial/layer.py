"""A layer of a pool in three parts: before attention, attention over a cache, and after attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.attention import Attention
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.step import INT32, INT64, LayerCache, LayerStep, Rotation, attention_bias
from dynexport.exporter.graph.values import add_input
from dynexport.exporter.lowering.target import Target
from dynexport.runtime.bundle.contract import Radial

# Added to the score of an entry that a token may not see; of several such exp() is 0, and no sum of them overflows.
_HIDDEN = -1e30
Prepared: TypeAlias = tuple[ir.Value, ir.Value, ir.Value]


def prepare(op: Any, layer: DecoderLayer, hidden_states: ir.Value, angles: Rotation | None) -> Prepared:
    """Return query, key, value float [1, N, ..] of hidden states [1, N, hidden], normed and rotated."""
    projected = layer.self_attn.qkv_proj(op, layer.before_attention(op, hidden_states))
    query, key, value = layer.self_attn.prepare(op, projected, angles)
    if key is None or value is None:
        query, key, value = layer.self_attn.split(op, query)
    return query, key, value


def add_cache(
    graph: ir.Graph, architecture: Architecture, target: Target, contract: Radial, prefix: str, *, spare: int = 0
) -> dict[str, ir.Value]:
    """Add a cache's inputs to a graph and return them by part.

    Args:
        graph: the graph.
        architecture: the model's architecture.
        target: the engine that the graph is written for.
        contract: the bundle's contract.
        prefix: the first part of the inputs' names.
        spare: number of extra slots behind the entries, for a graph with a fixed number of slots.
    """
    slots: int | str = "M"
    if target.fixed_slots:
        slots = architecture.max_length * contract.entries_per_token + spare
    shape: list[int | str] = ["B", architecture.kv_heads, slots, target.cache_head_dim(architecture.head_dim)]
    found = {part: add_input(graph, f"{prefix}.{part}", target.cache_dtype, shape) for part in ("key", "value")}
    counted: tuple[str, ...] = ("position",) if architecture.needs_key_positions(0) else ()
    if contract.cache_policy == "layer":
        counted = ("position", "step")
    return found | {part: add_input(graph, f"{prefix}.{part}", INT64, ["B", slots]) for part in counted}


@dataclass(frozen=True)
class Tokens:
    """The tokens of an attention call: C per row of B rows, in the order of their positions.

    Attributes:
        prepared: query, key, value float [B, C, ..].
        step: the layer's positions, lengths and masks.
        now: the current hop, int64 scalar, where entries are tagged with their hop; else None.
    """

    prepared: Prepared
    step: LayerStep
    now: ir.Value | None


def attend(
    op: Any, architecture: Architecture, heads: Attention, tokens: Tokens, past: dict[str, ir.Value]
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Append to a cache and attend; return float [B, C, heads * head_dim] and the new cache."""
    step = tokens.step
    present: dict[str, ir.Value] = {}
    if tokens.now is not None:
        present, bias = _appended_and_seen(op, architecture, heads, step, past, tokens.now)
        step, past_entries = replace(step, bias=bias), LayerCache(past["key"], past["value"])
    else:
        past_entries = LayerCache(**past)
    output, entries = heads.attend(op, tokens.prepared, step, past_entries)
    return output, present | dict(zip(("key", "value", "position"), entries.values(), strict=False))


def layer_step(op: Any, target: Target, query: ir.Value, position_ids: ir.Value, cache_length: ir.Value) -> LayerStep:
    """Return the layer step for C tokens per row, query [B, C, ..]."""
    lengths = op.Add(cache_length, op.Shape(query, start=1, end=2))
    total = None if target.fixed_slots else op.Cast(op.ReduceMax(lengths, keepdims=0), to=INT32)
    return LayerStep(
        position_ids=position_ids,
        rotation=None,
        cache_length=cache_length,
        last_index=op.Cast(op.Sub(lengths, 1), to=INT32),
        total_length=total,
    )


def _appended_and_seen(
    op: Any, architecture: Architecture, heads: Attention, step: LayerStep, past: dict[str, ir.Value], now: ir.Value
) -> tuple[dict[str, ir.Value], ir.Value]:
    """Return positions and hops of all entries, and the attention bias that hides entries.

    A token sees its own entries, and those that earlier tokens made in this or an earlier hop.
    """
    assert step.position_ids is not None
    steps = op.Expand(now, op.Shape(step.position_ids))
    present = {
        part: heads.target.append_positions(op, past[part], new, step.cache_length)
        for part, new in (("position", step.position_ids), ("step", steps))
    }
    positions, made = present["position"], present["step"]
    if step.total_length is not None:
        stop = op.Cast(op.Unsqueeze(step.total_length, [0]), to=INT64)
        positions, made = (op.Slice(part, [0], stop, [1]) for part in (positions, made))
    keys, own = op.Unsqueeze(positions, [1]), op.Unsqueeze(step.position_ids, [2])
    up_to_now = op.LessOrEqual(op.Unsqueeze(made, [1]), now)
    seen = op.Or(op.Equal(keys, own), op.And(op.Less(keys, own), up_to_now))
    bias = op.Unsqueeze(op.Where(seen, 0.0, _HIDDEN), [1])
    more = attention_bias(op, architecture, heads.index, step.position_ids, positions)
    return present, bias if more is None else op.Add(bias, more)


def finish(
    op: Any, layer: DecoderLayer, hidden_states: ir.Value, attended: ir.Value, gates: ir.Value | None
) -> ir.Value:
    """Return a layer's output from its input and the output of attention, [1, N, ..] or [N, 1, ..]; gates [N]."""
    output = layer.after_attention(op, hidden_states, layer.self_attn.o_proj(op, attended))
    if gates is None:
        return output
    return gated(op, hidden_states, output, op.Reshape(gates, op.Concat(op.Shape(hidden_states, end=2), [1], axis=0)))


__all__ = ["Prepared", "Tokens", "add_cache", "attend", "finish", "layer_step", "prepare"]
