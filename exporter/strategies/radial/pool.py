"""One graph of all weights that a hop may need: the layers of the pool and the head, of which a call runs one part.

In one session all parts share worker threads, which stay awake between calls, and a whole layer is one call. Sessions
of their own would each have workers: those must sleep between calls, or they take the cores from each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import WriteBranch, either
from dynexport.exporter.graph.build import WriteGraph
from dynexport.exporter.graph.decoder import CausalLM, DecoderLayer
from dynexport.exporter.graph.step import BOOL, FLOAT, INT32, INT64, LayerStep, Rotation
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.radial.layer import Tokens, add_cache, attend, finish, prepare
from dynexport.exporter.strategies.radial.parts import add_angles
from dynexport.exporter.strategies.radial.plan import PoolPart
from dynexport.runtime.bundle.contract import Radial

# A part's number is 8 * i + these bits for layer i, and 8 * (number of layers) for the head.
_BITS = 3
_PREPARES, _FINISHES, _ATTENDS = (1 << bit for bit in range(_BITS))
_LINE = ("hidden_states", "cos", "sin")
_PREPARED = ("query", "key", "value")
_ENTRIES = ("position_ids", "cache_lengths", "last_index", "total_length", "step", "past_key_values.", "present.")
# Hidden states are [R, N, hidden]: a line of N tokens, or one token of each of R rows.
_OF_A_LINE: Mapping[str, int | str] = {"R": 1}
_OF_ROWS: Mapping[str, int | str] = {"R": "B", "N": 1}


def pool_parts(layers: int) -> tuple[PoolPart, ...]:
    """Return the parts of the graph: three of every layer, and the head."""
    return (*(part for i in range(layers) for part in _of_layer(i)), _head(layers))


def _of_layer(i: int) -> tuple[PoolPart, PoolPart, PoolPart]:
    first, whole = i << _BITS, _PREPARES | _FINISHES | _ATTENDS
    return (
        PoolPart(f"layer-{i}-before", first + _PREPARES, (i,), _LINE, _PREPARED, _OF_A_LINE, role="before_attention"),
        PoolPart(
            f"layer-{i}",
            first + whole,
            (i,),
            (*_LINE, "gates", *_ENTRIES),
            ("hidden_states_out", *_ENTRIES),
            _OF_ROWS,
            role="layer",
        ),
        PoolPart(
            f"layer-{i}-after",
            first + _FINISHES,
            (i,),
            ("hidden_states", "attention", "gates"),
            ("hidden_states_out",),
            _OF_A_LINE,
            role="after_attention",
        ),
    )


def _head(layers: int) -> PoolPart:
    return PoolPart("head", layers << _BITS, (), ("hidden_states",), ("logits",), _OF_A_LINE, role="head")


def pool_graph(architecture: Architecture, target: Target, contract: Radial, *, gated: bool) -> WriteGraph:
    """Return the writer of the graph: ``part`` int64, the part's number, and the inputs and outputs of all parts.

    They are those of ``parts.before_attention``, ``parts.after_attention`` and ``parts.head``. A whole layer is for one
    token of each of B rows: it takes hidden_states float [B, 1, hidden], with rotary positions cos and sin [B, 1, ..],
    with a gate gates float32 [B]; ``position_ids`` int64 [B, 1], ``cache_lengths`` int64 [B], ``last_index`` int32 [B],
    ``total_length`` int32, with cache_policy layer ``step`` int64, and the cache, as ``parts.attention``; and returns
    hidden_states_out float [B, 1, hidden] and the cache. Inputs that a part does not take are given empty, and outputs
    that it does not make are empty.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        given = _Inputs.added(graph, architecture, target, contract, gated=gated)
        layers: list[DecoderLayer] = list(model.model.layers)
        writer = _Pool(op, architecture, target, given)
        leaves: list[WriteBranch] = [writer.layer(layer) for layer in layers]
        leaves.append(writer.head(model))
        found = _one_of(op, writer.bits, leaves, writer.outputs)
        heads = layers[0].self_attn
        sizes = (heads.query_size, heads.kv_size, heads.kv_size)
        for name, value, size in zip(_PREPARED, found, sizes, strict=False):
            add_output(graph, value, name, typed_value(name, target.activations, ["R", "N", size]))
        hidden_states, logits, *present = found[len(_PREPARED) :]
        line = typed_value("hidden_states_out", target.activations, ["R", "N", architecture.hidden_size])
        add_output(graph, hidden_states, "hidden_states_out", line)
        add_output(graph, logits, "logits", typed_value("logits", FLOAT, ["R", "N", architecture.vocab_size]))
        for value, (part, entries) in zip(present, given.past.items(), strict=True):
            add_output(graph, value, f"present.{part}", entries)
        for unused in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(unused)

    return write


@dataclass(frozen=True)
class _Inputs:
    """The graph's inputs; ``gates`` float32 [R, N, 1]."""

    part: ir.Value
    hidden_states: ir.Value
    attention: ir.Value
    angles: Rotation | None
    gates: ir.Value | None
    step: LayerStep
    now: ir.Value | None
    past: dict[str, ir.Value]

    @classmethod
    def added(
        cls, graph: ir.Graph, architecture: Architecture, target: Target, contract: Radial, *, gated: bool
    ) -> _Inputs:
        """Add the inputs to the graph."""
        query = architecture.heads * architecture.head_dim
        return cls(
            part=add_input(graph, "part", INT64, []),
            hidden_states=add_input(graph, "hidden_states", target.activations, ["R", "N", architecture.hidden_size]),
            attention=add_input(graph, "attention", target.activations, ["R", "N", query]),
            angles=add_angles(graph, architecture, "R"),
            gates=add_input(graph, "gates", FLOAT, ["G"]) if gated else None,
            step=LayerStep(
                position_ids=add_input(graph, "position_ids", INT64, ["B", 1]),
                rotation=None,
                cache_length=add_input(graph, "cache_lengths", INT64, ["B"]),
                last_index=add_input(graph, "last_index", INT32, ["B"]),
                total_length=add_input(graph, "total_length", INT32, []),
            ),
            now=add_input(graph, "step", INT64, []) if contract.cache_policy == "layer" else None,
            past=add_cache(graph, architecture, target, contract, "past_key_values"),
        )


class _Pool:
    """Writes the branches of the graph; every branch has all outputs, empty ones for what it does not compute.

    Attributes:
        bits: bool scalars, the bits of the layer's number, or of the number of layers for the head; the lowest first.
        outputs: number of outputs of every branch.
    """

    def __init__(self, op: Any, architecture: Architecture, target: Target, given: _Inputs) -> None:
        self._architecture, self._given = architecture, given
        count = _BITS + architecture.layers.bit_length()
        powers = op.initializer(ir.tensor(np.array([1 << bit for bit in range(count)], np.int64)), "powers")
        found = op.Cast(op.Mod(op.Div(given.part, powers), 2), to=BOOL)
        self._prepares, self._finishes, self._attends, *self.bits = op.Split(
            found, axis=0, num_outputs=count, _outputs=count
        )
        a, dtype = architecture, target.activations
        self._no = {
            size: op.initializer(ir.tensor(np.zeros((1, 0, size), np.float32), dtype=dtype), f"no_{size}")
            for size in {a.heads * a.head_dim, a.kv_heads * a.head_dim, a.hidden_size}
        }
        nothing = ir.tensor(np.zeros((1, 0, a.vocab_size), np.float32))
        self._no_logits = op.initializer(nothing, "no_logits")
        self.outputs = len(_PREPARED) + 2 + len(given.past)

    def layer(self, layer: DecoderLayer) -> WriteBranch:
        """Return the writer of a layer's branch."""
        given, heads, name = self._given, layer.self_attn, f"layers_{layer.index}"

        def write(op: Any) -> list[ir.Value]:
            def before(op: Any) -> list[ir.Value]:
                return [*prepare(op, layer, given.hidden_states, given.angles)]

            def attention(op: Any) -> list[ir.Value]:
                tokens = Tokens((prepared[0], prepared[1], prepared[2]), given.step, given.now)
                output, present = attend(op, self._architecture, heads, tokens, given.past)
                return [output, *(present[part] for part in given.past)]

            def after(op: Any) -> list[ir.Value]:
                return [finish(op, layer, given.hidden_states, attended, given.gates)]

            none = self._empty(heads.query_size, heads.kv_size, heads.kv_size)
            prepared = either(op, self._prepares, before, none, len(_PREPARED), f"{name}_before")
            as_given = _passed(given.attention, *given.past.values())
            count = 1 + len(given.past)
            attended, *present = either(op, self._attends, attention, as_given, count, f"{name}_attention")
            none = self._empty(self._architecture.hidden_size)
            (output,) = either(op, self._finishes, after, none, 1, f"{name}_after")
            return [*prepared, output, op.Identity(self._no_logits), *present]

        return write

    def head(self, model: CausalLM) -> WriteBranch:
        """Return the writer of the head's branch."""
        given, heads = self._given, model.model.layers[0].self_attn

        def write(op: Any) -> list[ir.Value]:
            empty = self._empty(heads.query_size, heads.kv_size, heads.kv_size, self._architecture.hidden_size)
            logits = model.head(op, model.model.norm(op, given.hidden_states))
            return [*empty(op), logits, *_passed(*given.past.values())(op)]

        return write

    def _empty(self, *sizes: int) -> WriteBranch:
        return _passed(*(self._no[size] for size in sizes))


def _passed(*values: ir.Value) -> WriteBranch:
    return lambda op: [op.Identity(value) for value in values]


def _one_of(
    op: Any, bits: Sequence[ir.Value], leaves: Sequence[WriteBranch], count: int, first: int = 0
) -> Sequence[ir.Value]:
    """Write a binary tree of ``If`` that runs the leaf of an index, and return its outputs.

    Args:
        op: writes operators into the graph.
        bits: bool scalars, the bits of the index within the leaves, the lowest first.
        leaves: the branches.
        count: number of outputs of each.
        first: the index of the first one.
    """
    if len(leaves) == 1:
        return leaves[0](op)
    *lower, highest = bits
    half = 1 << len(lower)
    if len(leaves) <= half:
        return _one_of(op, lower, leaves, count, first)
    name = f"parts_{first}_{first + len(leaves)}"

    def of_upper(op: Any) -> Sequence[ir.Value]:
        return _one_of(op, lower, leaves[half:], count, first + half)

    def of_lower(op: Any) -> Sequence[ir.Value]:
        return _one_of(op, lower, leaves[:half], count, first)

    return either(op, highest, of_upper, of_lower, count, name)


__all__ = ["pool_graph", "pool_parts"]
