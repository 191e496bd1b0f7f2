"""All hops of a Radial Network in one graph, without conditions and without a shape that depends on a choice.

The call's T = B * S tokens are concatenated row by row. In every hop every layer runs C of them: those that chose it,
in order, and then others as padding, whose results are dropped. A token whose layer is full is turned away: in this hop
it keeps its hidden state, adds no entry, and the layer does not count as visited.

The graph holds every weight once, for all hops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import WriteGraph
from dynexport.exporter.graph.decoder import CausalLM, DecoderLayer
from dynexport.exporter.graph.selection import capacity, chosen_first
from dynexport.exporter.graph.step import FLOAT, INT64, Rotation, inverse_frequencies, rotation
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.lowering.plan import PADDED_CHUNK
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.radial.checks import check_single_graph
from dynexport.exporter.strategies.radial.layer import (
    Prepared,
    Tokens,
    add_cache,
    attend,
    finish,
    layer_step,
    prepare,
)
from dynexport.exporter.strategies.radial.paths import Decision, Paths, any_of
from dynexport.exporter.strategies.radial.router import Router
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.execution.decisions import TURNED_AWAY


@dataclass(frozen=True)
class _Line:
    """The values that all hops share: T concatenated tokens of B rows with S each; every layer runs C of them.

    Attributes:
        shape: int64 [2], B and S.
        places: int64 [T], 0, 1, 2, ..
        places_in_row: int64 [S], 0, 1, 2, ..
        row_numbers: int64 [B, 1], 0, 1, 2, ..
        position_ids: int64 [T].
        angles: cos and sin of every token, float32 [1, T, rotary dim / 2]; None without rotary positions.
        room: int64 [1], C.
        layers: int64 [L, 1], 0, 1, 2, .. for the pool's layers.
    """

    shape: ir.Value
    places: ir.Value
    places_in_row: ir.Value
    row_numbers: ir.Value
    position_ids: ir.Value
    angles: Rotation | None
    room: ir.Value
    layers: ir.Value

    @classmethod
    def prepare(cls, op: Any, architecture: Architecture, position_ids: ir.Value, layer_capacity: float) -> _Line:
        rows, length = (op.Shape(position_ids, start=axis, end=axis + 1) for axis in (0, 1))
        tokens = op.Mul(rows, length)
        line = op.Reshape(position_ids, [-1])
        numbers = ir.tensor(np.arange(architecture.layers, dtype=np.int64)[:, None])
        return cls(
            shape=op.Shape(position_ids),
            places=op.Range(0, op.Squeeze(tokens, [0]), 1),
            places_in_row=op.Range(0, op.Squeeze(length, [0]), 1),
            row_numbers=op.Unsqueeze(op.Range(0, op.Squeeze(rows, [0]), 1), [1]),
            position_ids=line,
            angles=rotation(op, inverse_frequencies(op, architecture), op.Unsqueeze(line, [0])),
            room=capacity(op, layer_capacity, "ceil", tokens),
            layers=op.initializer(numbers, "layer_numbers"),
        )

    def in_rows(self, op: Any, values: ir.Value) -> ir.Value:
        """Return [T] as [B, S]."""
        return op.Reshape(values, self.shape)

    def angles_of(self, op: Any, index: ir.Value) -> Rotation | None:
        """Return the angles of the tokens ``index``, int64 [C]."""
        if self.angles is None:
            return None
        cos, sin = (op.Gather(part, index, axis=1) for part in (self.angles.cos, self.angles.sin))
        return Rotation(cos, sin, of_every_position=False)


@dataclass(frozen=True)
class _Dispatch:
    """The assignment of tokens to layers in a hop.

    Attributes:
        runs: bool [L, T], true where the token runs in the layer.
        ran: bool [T], true where the token runs in any layer.
        index: per layer int64 [C], indices into T of the tokens that its matrix products run on.
        seat: int64 [T], a running token's index among the C of its layer; 0 for others.
        seat_of_all: int64 [T], a running token's index among the L * C of all layers.
    """

    runs: ir.Value
    ran: ir.Value
    index: list[ir.Value]
    seat: ir.Value
    seat_of_all: ir.Value

    @classmethod
    def of(cls, op: Any, line: _Line, decision: Decision, layers: int) -> _Dispatch:
        chosen = op.And(op.Equal(op.Unsqueeze(decision.choice, [0]), line.layers), op.Unsqueeze(decision.goes, [0]))
        before = op.CumSum(op.Cast(chosen, to=INT64), 1, exclusive=1)
        runs = op.And(chosen, op.Less(before, line.room))
        index = chosen_first(op, chosen, line.places, line.room)
        index.shape = runs.shape = ir.Shape([layers, None])
        seat, layer = (op.ReduceSum(op.Where(runs, numbers, 0), [0], keepdims=0) for numbers in (before, line.layers))
        return cls(
            runs=runs,
            ran=any_of(op, runs, 0),
            index=[op.Gather(index, layer, axis=0) for layer in range(layers)],
            seat=seat,
            seat_of_all=op.Add(op.Mul(layer, line.room), seat),
        )


class _Walk:
    """The state of all tokens between hops; ``hidden_states`` is float [T, hidden]."""

    def __init__(
        self,
        op: Any,
        model: CausalLM,
        contract: Radial,
        line: _Line,
        *,
        hidden_states: ir.Value,
        alive: ir.Value,
        caches: list[dict[str, ir.Value]],
        lengths: list[ir.Value],
    ) -> None:
        self._op, self._model, self._contract, self._line = op, model, contract, line
        self._layers: list[DecoderLayer] = list(model.model.layers)
        self.hidden_states, self.caches, self._lengths = hidden_states, caches, lengths
        self.paths = Paths(op, contract, len(self._layers), alive)

    def step(self, step: int, router: Router, forced: ir.Value) -> None:
        """Write one hop: every token that has not exited chooses a layer and runs it.

        Args:
            step: the hop's number.
            router: the hop's router.
            forced: int64 [T], -1 where the router decides.
        """
        op = self._op
        decision = self.paths.decide(router, self.hidden_states, forced)
        dispatch = _Dispatch.of(op, self._line, decision, len(self._layers))
        self._run(step, dispatch, decision.probability)
        turned_away = op.And(decision.goes, op.Not(dispatch.ran))
        self.paths.follow(decision, op.Where(turned_away, TURNED_AWAY, decision.path(op)))

    def _run(self, step: int, dispatch: _Dispatch, gates: ir.Value | None) -> None:
        """Run every layer on the tokens that chose it."""
        op, line = self._op, self._line
        states = [op.Unsqueeze(op.Gather(self.hidden_states, index), [0]) for index in dispatch.index]
        prepared = [
            prepare(op, layer, state, line.angles_of(op, index))
            for layer, state, index in zip(self._layers, states, dispatch.index, strict=True)
        ]
        outputs = []
        for number, attended in enumerate(self._attended(step, dispatch, prepared)):
            gate = op.Gather(gates, dispatch.index[number]) if gates is not None else None
            outputs.append(finish(op, self._layers[number], states[number], attended, gate))
        after = op.Gather(self._side_by_side(outputs), dispatch.seat_of_all)
        self.hidden_states = op.Where(op.Unsqueeze(dispatch.ran, [1]), after, self.hidden_states)

    def _attended(self, step: int, dispatch: _Dispatch, prepared: Sequence[Prepared]) -> list[ir.Value]:
        """Return the output of attention for each layer's tokens, float [1, C, heads * head_dim] each."""
        op, line = self._op, self._line
        if self._contract.cache_policy == "step":
            together = tuple(self._side_by_side(part) for part in zip(*prepared, strict=True))
            rows = _Rows.of(op, line, dispatch.ran, op.Shape(line.places_in_row))
            attended = self._attend(step, rows, together, dispatch.seat_of_all, None)
            return [rows.back(op, attended, index) for index in dispatch.index]
        most = op.Min(op.Shape(line.places_in_row), line.room)
        now = op.initializer(ir.tensor(np.array(step, np.int64)), f"step_{step}")
        found = []
        for layer, index in enumerate(dispatch.index):
            rows = _Rows.of(op, line, op.Gather(dispatch.runs, layer, axis=0), most)
            alone = tuple(op.Squeeze(part, [0]) for part in prepared[layer])
            found.append(rows.back(op, self._attend(layer, rows, alone, dispatch.seat, now), index))
        return found

    def _attend(
        self, place: int, rows: _Rows, prepared: tuple[ir.Value, ...], seat: ir.Value, now: ir.Value | None
    ) -> ir.Value:
        """Append to the cache of one place, attend, and return the output, float [B * C, heads * head_dim].

        Args:
            place: the cache's number.
            rows: the tokens by row.
            prepared: query, key, value float [seats, ..].
            seat: int64 [T], each token's index in ``prepared``.
            now: the hop, where entries are tagged with it; else None.
        """
        op, architecture = self._op, self._model.architecture
        seats = op.Gather(seat, rows.token)
        query, key, value = (op.Gather(part, seats) for part in prepared)
        positions = op.Gather(self._line.position_ids, rows.token)
        heads = self._layers[0].self_attn
        step = layer_step(op, heads.target, query, positions, self._lengths[place])
        if now is not None:
            step = replace(step, counts=rows.counts)
        tokens = Tokens((query, key, value), step, now)
        past = self.caches[place]
        output, self.caches[place] = attend(op, architecture, heads, tokens, past)
        for part, entries in self.caches[place].items():  # shape inference does not know attention's outputs
            entries.type, entries.shape = past[part].type, past[part].shape
        self._lengths[place] = op.Add(self._lengths[place], rows.counts)
        return op.Reshape(output, [-1, heads.query_size])

    def _side_by_side(self, parts: Sequence[ir.Value]) -> ir.Value:
        """Return [1, C, features] of every layer as [L * C, features]."""
        return self._op.Squeeze(self._op.Concat(*parts, axis=1), [0])


@dataclass(frozen=True)
class _Rows:
    """The tokens of an attention call, padded to C per row, in the order of their positions.

    Attributes:
        token: int64 [B, C], indices into T; a row's tokens come first, then padding.
        counts: int64 [B], number of tokens of each row without padding.
        place: int64 [T], each token's index in [B * C].
    """

    token: ir.Value
    counts: ir.Value
    place: ir.Value

    @classmethod
    def of(cls, op: Any, line: _Line, some: ir.Value, most: ir.Value) -> _Rows:
        """Build the rows of the tokens ``some``, bool [T], with ``most``, int64 [1], places per row."""
        by_row = line.in_rows(op, some)
        token = chosen_first(op, by_row, line.places_in_row, most)
        numbers = op.Cast(by_row, to=INT64)
        before = op.Min(op.CumSum(numbers, 1, exclusive=1), op.Sub(most, 1))
        length = op.Shape(line.places_in_row)
        return cls(
            op.Add(token, op.Mul(line.row_numbers, length)),
            op.ReduceSum(numbers, [1], keepdims=0),
            op.Reshape(op.Add(before, op.Mul(line.row_numbers, most)), [-1]),
        )

    def back(self, op: Any, attended: ir.Value, index: ir.Value) -> ir.Value:
        """Return the output of attention [B * C, features] for the tokens ``index``, int64 [N]: [1, N, features]."""
        return op.Unsqueeze(op.Gather(attended, op.Gather(self.place, index)), [0])


def single_graph(
    architecture: Architecture,
    target: Target,
    contract: Radial,
    routers: Sequence[Router],
    layer_capacity: float,
) -> WriteGraph:
    """Return the writer of a graph: input_ids, position_ids int64 [B, S] -> logits float32 [B, K, vocab] and paths.

    Other inputs: cache_lengths int64 [places, B]; token_counts int64 [B], number of real tokens; forced_paths int64
    [hops, B, S], -1 where the router decides; logits_indices int64 [B, K]; ``past_key_values.{place}.*``. Other
    outputs: paths int64, path_scores and path_margins float32 [hops, B, S]; overflow int64 [1, B]; ``present.*``. There
    is one place per hop or per layer, depending on the contract's cache_policy.

    Args:
        architecture: the model's architecture.
        target: the engine that the graph is written for.
        contract: the bundle's contract.
        routers: one router per hop.
        layer_capacity: share of the B * S tokens that every layer has room for in a hop.
    """

    def write(graph: ir.Graph, op: Any, model: CausalLM) -> None:
        places = contract.places(architecture.layers)
        input_ids, position_ids = (add_input(graph, name, INT64, ["B", "S"]) for name in ("input_ids", "position_ids"))
        cache_lengths = add_input(graph, "cache_lengths", INT64, [places, "B"])
        token_counts = add_input(graph, "token_counts", INT64, ["B"])
        forced = add_input(graph, "forced_paths", INT64, [contract.max_steps, "B", "S"])
        logits_indices = add_input(graph, "logits_indices", INT64, ["B", "K"])
        past = [
            add_cache(graph, architecture, target, contract, f"past_key_values.{i}", spare=PADDED_CHUNK)
            for i in range(places)
        ]

        line = _Line.prepare(op, architecture, position_ids, layer_capacity)
        states = op.Reshape(model.model.embed(op, input_ids, position_ids), [-1, architecture.hidden_size])
        real = op.Reshape(op.Less(op.Unsqueeze(line.places_in_row, [0]), op.Unsqueeze(token_counts, [1])), [-1])
        lengths = [op.Gather(cache_lengths, place, axis=0) for place in range(places)]
        walk = _Walk(op, model, contract, line, hidden_states=states, alive=real, caches=[*past], lengths=lengths)
        for step, router in enumerate(routers):
            walk.step(step, router, op.Reshape(op.Gather(forced, step, axis=0), [-1]))

        states = op.Reshape(walk.hidden_states, op.Concat(line.shape, [architecture.hidden_size], axis=0))
        wanted = op.GatherND(states, op.Unsqueeze(logits_indices, [-1]), batch_dims=1)
        logits = model.head(op, model.model.norm(op, wanted))
        add_output(graph, logits, "logits", typed_value("logits", FLOAT, ["B", "K", architecture.vocab_size]))
        for place, (before, after) in enumerate(zip(past, walk.caches, strict=True)):
            for part, entries in before.items():
                add_output(graph, after[part], f"present.{place}.{part}", entries)
        paths = walk.paths.put_out(graph, position_ids)
        turned_away = op.Cast(op.Equal(paths, TURNED_AWAY), to=INT64)
        overflow = op.Squeeze(op.ReduceSum(turned_away, [0, 2], keepdims=1), [2])
        add_output(graph, overflow, "overflow", typed_value("overflow", INT64, [1, "B"]))
        check_single_graph(graph, architecture, contract, layer_capacity, fixed_slots=target.fixed_slots)

    return write


__all__ = ["single_graph"]
