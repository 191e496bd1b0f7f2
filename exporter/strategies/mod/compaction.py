"""Gather a routed layer's chosen tokens and scatter its output back, in one of three forms.

``Ragged`` has exactly the chosen tokens, ``Padded`` a fixed number per row, ``EveryRow`` one token of every row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.selection import chosen_first
from dynexport.exporter.graph.step import (
    FLOAT,
    INT32,
    INT64,
    AttendRows,
    LayerCache,
    LayerStep,
    Line,
    Rotation,
    Step,
    rotation,
)
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.mod.routing import Route, Routing
from dynexport.plugins.route_bodies import add_gated
from dynexport.plugins.routes import scatter_gated
from dynexport.runtime.bundle.contract import Mod


class Compacted(ABC):
    """The chosen tokens as a layer's input: ``hidden_states`` and the layer's ``step``."""

    hidden_states: ir.Value
    step: LayerStep | Line

    @abstractmethod
    def strength(self, op: Any) -> ir.Value:
        """Return the strength of their routes in a shape that broadcasts with their hidden states."""

    @abstractmethod
    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        """Return hidden states [B, S, hidden] with those of the chosen tokens replaced."""

    def add(self, op: Any, contract: Mod, output: ir.Value) -> ir.Value:
        """Return hidden states [B, S, hidden] with h + g (y - h) for chosen tokens, y ``output``."""
        return self.put_back(op, gated(op, self.hidden_states, output, self.strength(op)))


class Ragged(Compacted):
    """Exactly the chosen tokens, concatenated over all rows: [N, hidden], N >= 1.

    Only attention needs them by row. In a decode step every row has one token, so that its place is known; in a prompt
    the rows are as long as the most that one of them chose.
    """

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self._layer, self._route, self._step, self._routing = layer, route, step, routing
        self._before, self._target = hidden_states, routing.target
        self.hidden_states, self._places = self._target.gather_tokens(op, hidden_states, route.chosen)
        self.step = self

    def attend(
        self, op: Any, projected: ir.Value, attend: AttendRows, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Return the attention of the packed tokens; see ``Line.attend``."""
        output, *present = either(
            op,
            self._routing.one_token,
            lambda op: self._attend_one(op, projected, attend),
            lambda op: self._attend_many(op, projected, attend),
            1 + len(cache.values()),
            f"layer_{self._layer}_tokens",
        )
        return output, LayerCache(*present)

    def _attend_one(self, op: Any, projected: ir.Value, attend: AttendRows) -> list[ir.Value]:
        """Attend for one token of every row; those of other rows are zeros, whose entries do not count."""
        rows = op.ScatterND(self._routing.no_projection, self._places, projected)
        output, present = attend(op, rows, _one_token_step(op, self._layer, self._step, self._routing))
        return [op.GatherND(output, self._places), *present.values()]

    def _attend_many(self, op: Any, projected: ir.Value, attend: AttendRows) -> list[ir.Value]:
        rows = _Rows(op, self._layer, self._route, self._routing)
        output, present = attend(op, op.Gather(projected, rows.of_slot), rows.step(op, self._layer, self._step))
        architecture = self._step.architecture.of(self._layer)
        line = op.Reshape(output, [-1, architecture.heads * architecture.head_dim])
        return [op.Gather(line, rows.of_token), *present.values()]

    def strength(self, op: Any) -> ir.Value:
        return op.GatherND(self._route.strength, self._places)

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        return op.ScatterND(self._before, self._places, output)

    def add(self, op: Any, contract: Mod, output: ir.Value) -> ir.Value:
        if self._target.routes_at_once:
            sigmoid = contract.gate == "sigmoid"
            return scatter_gated(op, self._before, output, self._route.score, self._places, sigmoid=sigmoid)
        return add_gated(op, self._before, self.hidden_states, output, self.strength(op), self._places)


def _one_token_step(op: Any, layer: int, step: Step, routing: Routing) -> LayerStep:
    """Return the layer's step for one token of every row, chosen or not."""
    told = step.for_layer(op, layer)
    if told.total_length is not None:
        # ONNX Runtime's GroupQueryAttention takes one token over caches that are all empty for the beginning of a
        # prompt, and rotates the keys of all rows by the first row's position.
        tokens = op.Squeeze(op.Shape(step.inputs.input_ids, start=1, end=2), [0])
        told = replace(told, total_length=op.Max(told.total_length, op.Cast(op.Add(tokens, 1), to=INT32)))
    if routing.contract.positions == "original":
        return told
    positions, angles = op.Unsqueeze(told.cache_length, [1]), told.rotation
    if angles is None or not angles.of_every_position:
        angles = rotation(op, step.inputs.frequencies, positions)
    return replace(told, position_ids=positions, rotation=angles)


class _Rows:
    """The chosen tokens by row, C per row: the layout that attention takes.

    Rows with fewer than C tokens repeat other tokens as padding, which adds no entry.

    Attributes:
        of_slot: int64 [B, C], the index in [N] of each row's c-th token.
        of_token: int64 [N], the index of each token in [B * C].
    """

    def __init__(self, op: Any, layer: int, route: Route, routing: Routing) -> None:
        self._routing = routing
        self._index = op.Squeeze(op.NonZero(op.Reshape(route.chosen, [-1])), [0])
        counts = op.ReduceSum(op.Cast(route.chosen, to=INT32), [0, 2], keepdims=0)
        self._most = op.ReduceMax(counts, keepdims=1)
        self.of_slot, self.of_token = either(
            op,
            routing.one_row,
            lambda op: self._one_row(op),
            lambda op: self._rows(op, counts),
            2,
            f"layer_{layer}_rows",
        )

    def _one_row(self, op: Any) -> list[ir.Value]:
        line = op.Range(0, op.Squeeze(op.Shape(self._index), [0]), 1)
        return [op.Unsqueeze(line, [0]), op.Identity(line)]

    def _rows(self, op: Any, counts: ir.Value) -> list[ir.Value]:
        counts, most = op.Cast(counts, to=INT64), op.Cast(self._most, to=INT64)
        first = op.CumSum(counts, 0, exclusive=1)
        count = op.Squeeze(op.Shape(self._index), [0])
        slots = op.Add(op.Unsqueeze(first, [1]), op.Range(0, op.Squeeze(most, [0]), 1))
        row = op.Div(self._index, op.Shape(self._routing.places))
        place = op.Sub(op.Range(0, count, 1), op.Gather(first, row))
        return [op.Min(slots, op.Sub(count, 1)), op.Add(op.Mul(row, most), place)]

    def step(self, op: Any, layer: int, step: Step) -> LayerStep:
        """Return the layer's step for C tokens of every row."""
        architecture, routing = step.architecture, self._routing
        token = op.Gather(self._index, self.of_slot)
        cache_length = op.Gather(step.inputs.cache_lengths, step.row_of(layer))
        positions = angles = None
        if routing.contract.positions == "compact":
            slots = op.Range(0, op.Cast(op.Squeeze(self._most, [0]), to=INT64), 1)
            positions = op.Add(op.Unsqueeze(cache_length, [1]), slots)
            angles = rotation(op, step.inputs.frequencies, positions)
        elif routing.angles is not None:
            cos, sin = routing.angles
            angles = Rotation(op.Gather(cos, token), op.Gather(sin, token), of_every_position=False)
        if positions is None and architecture.needs_key_positions(layer):
            positions = op.Gather(op.Reshape(step.inputs.position_ids, [-1]), token)
        last = op.Add(op.Gather(routing.before_last, step.row_of(layer)), self._most)
        return LayerStep(
            position_ids=positions,
            rotation=angles,
            cache_length=cache_length,
            last_index=last,
            total_length=op.Add(op.ReduceMax(last, keepdims=0), 1),
        )


class Padded(Compacted):
    """``most`` tokens per row, the chosen ones first: [B, most, hidden]; no shape depends on a decision."""

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self._before, self._route, self._target = hidden_states, route, routing.target
        self._index = chosen_first(op, op.Squeeze(route.chosen, [0]), routing.places, routing.most)
        self.hidden_states = op.GatherND(hidden_states, op.Unsqueeze(self._index, [2]), batch_dims=1)
        positions = op.GatherElements(step.inputs.position_ids, self._index, axis=1)
        self.step = _padded_step(op, layer, step, routing, positions)

    def strength(self, op: Any) -> ir.Value:
        return op.Unsqueeze(op.GatherElements(op.Squeeze(self._route.strength, [2]), self._index, axis=1), [2])

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        assert self._route.rank is not None
        last = op.Sub(op.Shape(self._index, start=1, end=2), 1)
        rank = op.Min(op.Max(op.Sub(op.Squeeze(self._route.rank, [0]), 1), 0), last)
        of_token = op.GatherND(output, op.Unsqueeze(rank, [2]), batch_dims=1)
        return op.Where(op.Unsqueeze(op.Squeeze(self._route.chosen, [0]), [2]), of_token, self._before)

    def add(self, op: Any, contract: Mod, output: ir.Value) -> ir.Value:
        if not self._target.plugins:
            return super().add(op, contract, output)
        gate = self.strength(op)
        change = op.Sub(output, self.hidden_states)
        chosen = op.Cast(op.Squeeze(self._route.chosen, [0]), to=INT32)
        valid = op.GatherElements(chosen, self._index, axis=1)
        return self._target.add_rows(op, self._before, change, op.Squeeze(gate, [2]), self._index, valid)


def _padded_step(op: Any, layer: int, step: Step, routing: Routing, positions: ir.Value) -> LayerStep:
    """Return the layer's step for ``most`` tokens per row at ``positions``, int64 [B, most]."""
    cache_length = op.Gather(step.inputs.cache_lengths, step.row_of(layer))
    lengths = op.Add(cache_length, routing.most)
    fixed_slots = step.total_length is None
    if routing.contract.positions == "compact":
        positions = op.Add(op.Unsqueeze(cache_length, [1]), op.Range(0, op.Squeeze(routing.most, [0]), 1))
    return LayerStep(
        position_ids=positions,
        rotation=rotation(op, step.inputs.frequencies, positions),
        cache_length=cache_length,
        last_index=op.Cast(op.Sub(lengths, 1), to=INT32),
        total_length=None if fixed_slots else op.Cast(op.ReduceMax(lengths, keepdims=0), to=INT32),
    )


class EveryRow(Compacted):
    """One token of every row, chosen or not: [B, 1, hidden]."""

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self.hidden_states, self._route = hidden_states, route
        positions, angles = step.inputs.position_ids, step.rotation
        row = step.row_of(layer)
        cache_length, last = (op.Gather(values, row) for values in (step.inputs.cache_lengths, step.last_index))
        if routing.contract.positions == "compact":
            positions = op.Expand(op.Unsqueeze(cache_length, [1]), op.Shape(positions))
            angles = rotation(op, step.inputs.frequencies, positions)
        self.step = LayerStep(
            position_ids=positions,
            rotation=angles,
            cache_length=cache_length,
            last_index=last,
            total_length=None,
            append_later=True,
        )
        self._positions, self._cache_length, self._target = positions, cache_length, routing.target

    def any(self, op: Any) -> ir.Value:
        """Return whether any row runs, a bool scalar; as a number, because TensorRT's ReduceMax takes no booleans."""
        return op.Greater(op.ReduceMax(op.Cast(self._route.chosen, to=INT32), keepdims=0), 0)

    def no_entries(self, op: Any, cache: LayerCache) -> LayerCache:
        """Return zeros as the entries of a layer that does not run; the cache's length does not count them."""
        shape = cache.entries[0].shape
        assert shape is not None
        features = shape[1] * shape[3]
        sizes = op.Concat(op.Shape(self.hidden_states, start=0, end=2), [features], axis=0)
        zeros = cast(op, op.Expand(op.Constant(value_float=0.0), sizes), self._target.activations)
        return LayerCache(zeros, zeros)

    def append(self, op: Any, cache: LayerCache, entries: LayerCache) -> LayerCache:
        """Return the cache with every row's entry appended; only chosen rows' entries count."""
        key, value = (
            self._target.append(op, past, new, self._cache_length)
            for past, new in zip(cache.entries, entries.entries, strict=True)
        )
        if cache.position is None:
            return LayerCache(key, value)
        position = self._target.append_positions(op, cache.position, self._positions, self._cache_length)
        return LayerCache(key, value, position)

    def strength(self, op: Any) -> ir.Value:
        return self._route.strength

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        return op.Where(op.Transpose(self._route.chosen, perm=[1, 2, 0]), output, self.hidden_states)


def combined(op: Any, contract: Mod, compacted: Compacted, output: ir.Value) -> ir.Value:
    """Return hidden states [B, S, hidden]: for chosen tokens y, g y or h + g (y - h) with the layer's output y."""
    if contract.gate not in ("raw", "sigmoid"):
        return compacted.put_back(op, output)
    if contract.combine == "delta":
        return compacted.add(op, contract, output)
    gate = compacted.strength(op)
    return compacted.put_back(op, cast(op, op.Mul(gate, cast(op, output, FLOAT)), output.dtype))


__all__ = ["Compacted", "EveryRow", "Padded", "Ragged", "combined"]
