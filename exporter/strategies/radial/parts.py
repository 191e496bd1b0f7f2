"""The graph set of a Radial Network: embedding, routers, layers in two parts, a shared attention, and the head.

A token's next layer is known only after its previous one has run, and tokens of one hop may be in different layers and
still attend to each other (docs/routing-contract.md, radial). So a layer is split at attention: the parts before and
after it run on the tokens that chose the layer, and attention runs on all tokens that share a cache. Every weight is in
exactly one graph.

Outside attention, tokens of all rows are concatenated: [1, N, ..]. "float" is the target's activation type, which
hidden states, queries, keys, values and caches have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.build import WriteGraph
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.step import (
    BOOL,
    FLOAT,
    INT32,
    INT64,
    LayerStep,
    Rotation,
    inverse_frequencies,
    rotation,
)
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.radial.layer import Tokens, add_cache, attend, finish, prepare
from dynexport.exporter.strategies.radial.router import Router, choose
from dynexport.runtime.bundle.contract import Radial


def embedding(architecture: Architecture, target: Target) -> WriteGraph:
    """Return the writer of the embedding: input_ids, position_ids int64 [1, N] -> hidden_states float [1, N, hidden].

    With rotary positions it also gives cos and sin, float32 [1, N, rotary dim / 2], which all layers use.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        input_ids = add_input(graph, "input_ids", INT64, [1, "N"])
        position_ids = add_input(graph, "position_ids", INT64, [1, "N"])
        hidden_states = model.model.embed(op, input_ids, position_ids)
        _put_out(graph, hidden_states, "hidden_states_out", line_shape(architecture), target.activations)
        angles = rotation(op, inverse_frequencies(op, architecture), position_ids)
        if angles is not None:
            _put_out(graph, angles.cos, "cos", _angles(architecture))
            _put_out(graph, angles.sin, "sin", _angles(architecture))

    return write


def head(architecture: Architecture, target: Target) -> WriteGraph:
    """Return the writer of the head: hidden_states float [1, N, hidden] -> logits float32 [1, N, vocab]."""

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        hidden_states = add_input(graph, "hidden_states", target.activations, line_shape(architecture))
        logits = model.head(op, model.model.norm(op, hidden_states))
        _put_out(graph, logits, "logits", [1, "N", architecture.vocab_size])

    return write


def router(architecture: Architecture, target: Target, choices: int, module: Router, *, gated: bool) -> WriteGraph:
    """Return the writer of a router, which chooses every token's next layer.

    Inputs: hidden_states float [1, N, hidden]; allowed bool [N, choices], at least one true per token; forced_choices
    int64 [N], -1 where the router decides. Outputs: choices int64 [N], the best allowed one, the lowest on ties; scores
    float32 [N, choices]; margins float32 [N], the distance to the second best, infinity without one; with a gate
    probabilities float32 [N], of the choice among the allowed ones.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        hidden_states = add_input(graph, "hidden_states", target.activations, line_shape(architecture))
        allowed = add_input(graph, "allowed", BOOL, ["N", choices])
        forced = add_input(graph, "forced_choices", INT64, ["N"])
        scores = op.Squeeze(module(op, hidden_states), [0])
        chosen = choose(op, scores, allowed, forced, choices, gated=gated)
        _put_out(graph, chosen.choices, "choices", ["N"], INT64)
        _put_out(graph, scores, "scores", ["N", choices])
        _put_out(graph, chosen.margins, "margins", ["N"])
        if chosen.probabilities is not None:
            _put_out(graph, chosen.probabilities, "probabilities", ["N"])

    return write


def before_attention(architecture: Architecture, target: Target) -> WriteGraph:
    """Return the writer of a layer up to attention.

    Inputs: hidden_states float [1, N, hidden]; cos and sin with rotary positions. Outputs: query, key, value float
    [1, N, ..].
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        (module,) = model.model.layers
        hidden_states = add_input(graph, "hidden_states", target.activations, line_shape(architecture))
        angles = add_angles(graph, architecture)
        query, key, value = prepare(op, module, hidden_states, angles)
        heads = module.self_attn
        _put_out(graph, query, "query", [1, "N", heads.query_size], target.activations)
        _put_out(graph, key, "key", [1, "N", heads.kv_size], target.activations)
        _put_out(graph, value, "value", [1, "N", heads.kv_size], target.activations)

    return write


def attention(architecture: Architecture, target: Target, contract: Radial) -> WriteGraph:
    """Return the writer of attention, which appends C tokens per row to a cache and attends; it has no weights.

    Inputs: query, key, value float [B, C, ..] in the order of positions; position_ids int64 [B, C], cache_lengths int64
    [B], last_index int32 [B] and total_length int32 as in ``LayerStep``; a cache. With cache_policy layer also ``step``
    int64, the tokens' hop; the cache then stores the hop of every entry. Unused inputs are left out. Outputs: attention
    float [B, C, heads * head_dim]; the cache.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        (module,) = model.model.layers
        heads = module.self_attn
        sizes = {"query": heads.query_size, "key": heads.kv_size, "value": heads.kv_size}
        query, key, value = (
            add_input(graph, name, target.activations, ["B", "C", size]) for name, size in sizes.items()
        )
        position_ids = add_input(graph, "position_ids", INT64, ["B", "C"])
        cache_length = add_input(graph, "cache_lengths", INT64, ["B"])
        last_index = add_input(graph, "last_index", INT32, ["B"])
        total_length = None if target.fixed_slots else add_input(graph, "total_length", INT32, [])
        now = add_input(graph, "step", INT64, []) if contract.cache_policy == "layer" else None
        past = add_cache(graph, architecture, target, contract, "past_key_values")
        step = LayerStep(
            position_ids=position_ids,
            rotation=None,
            cache_length=cache_length,
            last_index=last_index,
            total_length=total_length,
        )
        output, present = attend(op, architecture, heads, Tokens((query, key, value), step, now), past)
        _put_out(graph, output, "attention", ["B", "C", heads.query_size], target.activations)
        for part, entries in past.items():
            add_output(graph, present[part], f"present.{part}", entries)
        for unused in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(unused)

    return write


def after_attention(architecture: Architecture, target: Target, *, gated: bool) -> WriteGraph:
    """Return the writer of a layer's part after attention.

    Inputs: the layer's hidden_states float [1, N, hidden]; attention float [1, N, heads * head_dim]; with a gate gates
    float32 [N]. Output: hidden_states_out float [1, N, hidden].
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        (module,) = model.model.layers
        hidden_states = add_input(graph, "hidden_states", target.activations, line_shape(architecture))
        attended = add_input(graph, "attention", target.activations, [1, "N", module.self_attn.query_size])
        gates = add_input(graph, "gates", FLOAT, ["N"]) if gated else None
        output = finish(op, module, hidden_states, attended, gates)
        _put_out(graph, output, "hidden_states_out", line_shape(architecture), target.activations)

    return write


def line_shape(architecture: Architecture) -> list[int | str]:
    """Return the shape of the hidden states of a line."""
    return [1, "N", architecture.hidden_size]


def add_angles(graph: ir.Graph, architecture: Architecture, rows: int | str = 1) -> Rotation | None:
    """Add the inputs cos and sin of the tokens [rows, N]; return None without rotary positions."""
    if not isinstance(architecture.positions, Rotary):
        return None
    cos, sin = (add_input(graph, name, FLOAT, [rows, *_angles(architecture)[1:]]) for name in ("cos", "sin"))
    return Rotation(cos, sin, of_every_position=False)


def _angles(architecture: Architecture) -> list[int | str]:
    assert isinstance(architecture.positions, Rotary)
    return [1, "N", architecture.positions.dim // 2]


def _put_out(
    graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT
) -> None:
    add_output(graph, value, name, typed_value(name, dtype, shape))


__all__ = [
    "add_angles",
    "after_attention",
    "attention",
    "before_attention",
    "embedding",
    "head",
    "line_shape",
    "router",
]
