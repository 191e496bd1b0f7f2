"""The graphs of a Radial Network: ends, router, and every layer in two parts around an attention that all share.

A token's next layer is known only when the one before it has run, and tokens of one step may be in different layers
and still attend to each other (docs/routing-contract.md, radial). So a layer is cut where attention is: what comes
before it and what comes after run on the tokens that chose the layer, attention on all tokens that share a cache.
Every weight stands in one graph.

Tokens outside attention come in one line, [1, N, ..], of whichever rows they are. Hidden states, queries, keys, values
and caches have the target's type of activations, here called float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.graph.attention import Attention
from dynexport.exporter.graph.build import IR_VERSION, add_input, add_output, register_parameters, typed_value
from dynexport.exporter.graph.decoder import CausalLM, DecoderLayer
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.layers import PLAIN, Linear, Norm
from dynexport.exporter.graph.step import (
    BOOL,
    FLOAT,
    INT32,
    INT64,
    LayerCache,
    LayerStep,
    Rotation,
    attention_bias,
    inverse_frequencies,
    rotation,
)
from dynexport.exporter.lowering.target import Target, cast
from dynexport.runtime.bundle.contract import Radial

# Added to the score of an entry that a token may not see; of several such exp() is 0, and no sum of them overflows.
_HIDDEN = -1e30
Write = Callable[[ir.Graph, Any, CausalLM], None]
Prepared: TypeAlias = tuple[ir.Value, ir.Value, ir.Value]


class Router(nn.Module):
    """fc2(silu(fc1(rms_norm(h)))): a score for every layer, and for leaving where the contract has an exit."""

    def __init__(self, target: Target, architecture: Architecture, hidden: int, choices: int) -> None:
        super().__init__()
        self.norm = Norm(target, "rms", architecture.hidden_size, architecture.norm_epsilon)
        self.fc1 = Linear(target, architecture.hidden_size, hidden, bias=True, storage=PLAIN)
        self.fc2 = Linear(target, hidden, choices, bias=True, storage=PLAIN)

    def forward(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """float [1, N, hidden] -> scores float32 [1, N, choices], all arithmetic in float32."""
        inner = self.fc1(op, self.norm(op, cast(op, hidden_states, FLOAT)))
        return self.fc2(op, op.Mul(inner, op.Sigmoid(inner)))


def build_part(name: str, model: CausalLM, target: Target, write: Write) -> ir.Model:
    """One graph, its weights still without values; of the model's weights it has those that it uses."""
    graph = ir.Graph([], [], nodes=[], name=name, opset_imports=dict(target.opset_imports))
    builder = GraphBuilder(graph)
    register_parameters(graph, model)
    write(graph, builder.op, model)
    for initializer in [value for value in graph.initializers.values() if not value.uses()]:
        del graph.initializers[str(initializer.name)]
    finished = ir.Model(graph, ir_version=IR_VERSION, producer_name="dynexport")
    target.finish(finished)
    return finished


def embedding(architecture: Architecture, target: Target) -> Write:
    """input_ids, position_ids int64 [1, N] -> hidden_states float [1, N, hidden].

    With rotary positions also cos and sin float32 [1, N, rotary dim / 2]: every layer of a path rotates by the same.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        input_ids = add_input(graph, "input_ids", INT64, [1, "N"])
        position_ids = add_input(graph, "position_ids", INT64, [1, "N"])
        hidden_states = model.model.embed(op, input_ids, position_ids)
        _put_out(graph, hidden_states, "hidden_states_out", _line(architecture), target.activations)
        angles = rotation(op, inverse_frequencies(op, architecture), position_ids)
        if angles is not None:
            _put_out(graph, angles.cos, "cos", _angles(architecture))
            _put_out(graph, angles.sin, "sin", _angles(architecture))

    return write


def head(architecture: Architecture, target: Target) -> Write:
    """hidden_states float [1, N, hidden] -> logits float32 [1, N, vocab]."""

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        hidden_states = add_input(graph, "hidden_states", target.activations, _line(architecture))
        logits = model.head(op, model.model.norm(op, hidden_states))
        _put_out(graph, logits, "logits", [1, "N", architecture.vocab_size])

    return write


def router(architecture: Architecture, target: Target, choices: int, module: Router, *, gated: bool) -> Write:
    """The choice of every token.

    hidden_states float [1, N, hidden]; allowed bool [N, choices], at least one for each token; forced_choices int64
    [N], -1 where the router decides -> choices int64 [N], the best allowed one, the lowest of equals; scores float32
    [N, choices]; margins float32 [N], to the second best, infinite without one; with a gate probabilities float32 [N],
    of the choice among the allowed.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        hidden_states = add_input(graph, "hidden_states", target.activations, _line(architecture))
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


@dataclass(frozen=True)
class Choices:
    """What became of N tokens' scores.

    Attributes:
        choices: int64 [N], what is forced, else the best allowed one, the lowest of equals.
        margins: float32 [N], from the best allowed one to the second, infinite without one.
        probabilities: float32 [N], of the choice among the allowed; None where nobody asks.
    """

    choices: ir.Value
    margins: ir.Value
    probabilities: ir.Value | None


def choose(op: Any, scores: ir.Value, allowed: ir.Value, forced: ir.Value, choices: int, *, gated: bool) -> Choices:
    """Choose for every token; without meaning where a token has nothing allowed.

    Args:
        scores: float32 [N, choices].
        allowed: bool [N or 1, choices].
        forced: int64 [N], -1 where the router decides.
        gated: whether anybody asks for probabilities.
    """
    masked = op.Where(allowed, scores, float("-inf"))
    if choices == 1:
        masked = op.Concat(masked, op.Add(masked, float("-inf")), axis=1)
    masked.type, masked.shape = ir.TensorType(FLOAT), ir.Shape([None, max(2, choices)])
    # The lower index of equals comes first.
    two, places = op.TopK(masked, [2], axis=1, sorted=1, _outputs=2)
    best, _ = op.Split(places, axis=1, num_outputs=2, _outputs=2)
    first, second = op.Split(two, axis=1, num_outputs=2, _outputs=2)
    choice = op.Where(op.Less(forced, 0), op.Squeeze(best, [1]), forced)
    margin = op.Squeeze(op.Sub(first, second), [1])
    if not gated:
        return Choices(choice, margin, None)
    chances = op.GatherElements(op.Softmax(masked, axis=1), op.Unsqueeze(choice, [1]), axis=1)
    return Choices(choice, margin, op.Squeeze(chances, [1]))


def before_attention(architecture: Architecture, target: Target) -> Write:
    """hidden_states float [1, N, hidden], cos and sin of rotary positions -> query, key, value float [1, N, ..]."""

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        (module,) = model.model.layers
        hidden_states = add_input(graph, "hidden_states", target.activations, _line(architecture))
        angles = None
        if isinstance(architecture.positions, Rotary):
            cos, sin = (add_input(graph, name, FLOAT, _angles(architecture)) for name in ("cos", "sin"))
            angles = Rotation(cos, sin, of_every_position=False)
        query, key, value = prepare(op, module, hidden_states, angles)
        heads = module.self_attn
        _put_out(graph, query, "query", [1, "N", heads.query_size], target.activations)
        _put_out(graph, key, "key", [1, "N", heads.kv_size], target.activations)
        _put_out(graph, value, "value", [1, "N", heads.kv_size], target.activations)

    return write


def prepare(op: Any, layer: DecoderLayer, hidden_states: ir.Value, angles: Rotation | None) -> Prepared:
    """query, key, value float [1, N, ..] of hidden states [1, N, hidden], normed and rotated."""
    projected = layer.self_attn.qkv_proj(op, layer.input_layernorm(op, hidden_states))
    query, key, value = layer.self_attn.prepare(op, projected, angles)
    if key is None or value is None:
        query, key, value = layer.self_attn.split(op, projected)
    return query, key, value


def attention(architecture: Architecture, target: Target, contract: Radial) -> Write:
    """Append and attend, C tokens of each of B rows, in the order of their positions; it has no weights.

    query, key, value float [B, C, ..], position_ids int64 [B, C], cache_lengths int64 [B], last_index int32 [B] and
    total_length int32 as ``LayerStep`` has them, a cache -> attention float [B, C, heads * head_dim], the cache. Where
    the cache is a layer's own, ``step`` int64 is the step of these tokens, and the cache has that of every entry. Of
    the inputs it has those that it uses.
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
        step = LayerStep(position_ids, None, cache_length, last_index, total_length)
        output, present = attend(op, architecture, heads, Tokens((query, key, value), step, now), past)
        _put_out(graph, output, "attention", ["B", "C", heads.query_size], target.activations)
        for part, entries in past.items():
            add_output(graph, present[part], f"present.{part}", entries)
        for unused in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(unused)

    return write


def add_cache(
    graph: ir.Graph, architecture: Architecture, target: Target, contract: Radial, prefix: str, *, spare: int = 0
) -> dict[str, ir.Value]:
    """Inputs for a cache of any layer of the pool, by what they hold.

    Args:
        spare: slots behind those that entries can fill, where their number stands in the graph.
    """
    slots: int | str = "M"
    if target.fixed_slots:
        slots = architecture.max_length * contract.entries_per_token + spare
    shape: list[int | str] = ["B", architecture.kv_heads, slots, target.cache_head_dim(architecture.head_dim)]
    found = {part: add_input(graph, f"{prefix}.{part}", target.activations, shape) for part in ("key", "value")}
    counted: tuple[str, ...] = ("position",) if architecture.needs_key_positions(0) else ()
    if contract.cache_policy == "layer":
        counted = ("position", "step")
    return found | {part: add_input(graph, f"{prefix}.{part}", INT64, ["B", slots]) for part in counted}


@dataclass(frozen=True)
class Tokens:
    """C tokens of each of B rows that come to attention, in the order of their positions.

    Attributes:
        prepared: query, key, value float [B, C, ..].
        step: what their layer has to know of them.
        now: int64 scalar, the step of their paths, where entries are tagged with theirs.
    """

    prepared: Prepared
    step: LayerStep
    now: ir.Value | None


def attend(
    op: Any, architecture: Architecture, heads: Attention, tokens: Tokens, past: dict[str, ir.Value]
) -> tuple[ir.Value, dict[str, ir.Value]]:
    """Append and attend: (float [B, C, heads * head_dim], the cache)."""
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
    """What a layer has to know of C tokens of each of B rows, query [B, C, ..]."""
    lengths = op.Add(cache_length, op.Shape(query, start=1, end=2))
    total = None if target.fixed_slots else op.Cast(op.ReduceMax(lengths, keepdims=0), to=INT32)
    return LayerStep(position_ids, None, cache_length, op.Cast(op.Sub(lengths, 1), to=INT32), total)


def _appended_and_seen(
    op: Any, architecture: Architecture, heads: Attention, step: LayerStep, past: dict[str, ir.Value], now: ir.Value
) -> tuple[dict[str, ir.Value], ir.Value]:
    """Positions and steps of all entries, and what hides those that a token may not see.

    It sees its own entries, and those of tokens before it that were made up to this step; of later tokens none.
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


def after_attention(architecture: Architecture, target: Target, *, gated: bool) -> Write:
    """The rest of a layer.

    hidden_states float [1, N, hidden] as they came to the layer, attention float [1, N, heads * head_dim], with a gate
    gates float32 [N] -> hidden_states_out float [1, N, hidden].
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        (module,) = model.model.layers
        hidden_states = add_input(graph, "hidden_states", target.activations, _line(architecture))
        attended = add_input(graph, "attention", target.activations, [1, "N", module.self_attn.query_size])
        gates = add_input(graph, "gates", FLOAT, ["N"]) if gated else None
        output = finish(op, module, hidden_states, attended, gates)
        _put_out(graph, output, "hidden_states_out", _line(architecture), target.activations)

    return write


def finish(
    op: Any, layer: DecoderLayer, hidden_states: ir.Value, attended: ir.Value, gates: ir.Value | None
) -> ir.Value:
    """The rest of a layer [1, N, hidden], from its input and what attention made of that; gates float32 [N]."""
    output = layer.after_attention(op, hidden_states, layer.self_attn.o_proj(op, attended))
    return output if gates is None else gated(op, hidden_states, output, op.Unsqueeze(gates, [0, 2]))


def _line(architecture: Architecture) -> list[int | str]:
    return [1, "N", architecture.hidden_size]


def _angles(architecture: Architecture) -> list[int | str]:
    assert isinstance(architecture.positions, Rotary)
    return [1, "N", architecture.positions.dim // 2]


def _put_out(
    graph: ir.Graph, value: ir.Value, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT
) -> None:
    add_output(graph, value, name, typed_value(name, dtype, shape))
