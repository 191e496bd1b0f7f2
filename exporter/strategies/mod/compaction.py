"""Gather a routed layer's chosen tokens and scatter its output back, in one of three forms.

``Ragged`` has exactly the chosen tokens, ``Padded`` a fixed number per row, ``EveryRow`` one token of every row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.selection import chosen_first
from dynexport.exporter.graph.step import FLOAT, INT32, INT64, LayerCache, LayerStep, Rotation, Step, rotation
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.mod.routing import Route, Routing
from dynexport.runtime.bundle.contract import Mod


class Compacted(ABC):
    """The chosen tokens as a layer's input: ``hidden_states`` and the layer's ``step``."""

    hidden_states: ir.Value
    step: LayerStep

    @abstractmethod
    def scores(self, op: Any) -> ir.Value:
        """Return their scores in a shape that broadcasts with their hidden states."""

    @abstractmethod
    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        """Return hidden states [B, S, hidden] with those of the chosen tokens replaced."""

    def add(self, op: Any, gate: ir.Value, output: ir.Value) -> ir.Value:
        """Return hidden states [B, S, hidden] with h + g (y - h) for chosen tokens; g float32, y ``output``."""
        return self.put_back(op, gated(op, self.hidden_states, output, gate))


class Ragged(Compacted):
    """Exactly the chosen tokens, concatenated over all rows: [N, hidden], N >= 1.

    Only attention needs them by row.
    """

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self._routing, self._route = routing, route
        hidden = step.architecture.hidden_size
        self._before = op.Reshape(hidden_states, [-1, hidden])
        self._index = op.Squeeze(op.NonZero(op.Reshape(route.chosen, [-1])), [0])
        self.hidden_states = op.Gather(self._before, self._index)
        counts = op.ReduceSum(op.Cast(route.chosen, to=INT32), [0, 2], keepdims=0)
        most = op.ReduceMax(counts, keepdims=1)
        self._of_slot, self._of_token = either(
            op,
            routing.one_row,
            lambda op: self._one_row(op),
            lambda op: self._rows(op, counts, most),
            2,
            f"layer_{layer}_rows",
        )
        self.step = self._layer_step(op, layer, step, most)

    def _one_row(self, op: Any) -> list[ir.Value]:
        line = op.Range(0, op.Squeeze(op.Shape(self._index), [0]), 1)
        return [op.Unsqueeze(line, [0]), op.Identity(line)]

    def _rows(self, op: Any, counts: ir.Value, most: ir.Value) -> list[ir.Value]:
        """Return the index in [N] of each row's c-th token, int64 [B, C]; and of each token in [B * C], int64 [N].

        Rows with fewer than C tokens repeat other tokens as padding, which adds no entry.
        """
        counts, most = op.Cast(counts, to=INT64), op.Cast(most, to=INT64)
        first = op.CumSum(counts, 0, exclusive=1)
        count = op.Squeeze(op.Shape(self._index), [0])
        slots = op.Add(op.Unsqueeze(first, [1]), op.Range(0, op.Squeeze(most, [0]), 1))
        row = op.Div(self._index, op.Shape(self._routing.places))
        place = op.Sub(op.Range(0, count, 1), op.Gather(first, row))
        return [op.Min(slots, op.Sub(count, 1)), op.Add(op.Mul(row, most), place)]

    def _layer_step(self, op: Any, layer: int, step: Step, most: ir.Value) -> LayerStep:
        architecture, routing = step.architecture, self._routing
        token = op.Gather(self._index, self._of_slot)
        cache_length = op.Gather(step.inputs.cache_lengths, step.row_of(layer))
        positions = angles = None
        if routing.contract.positions == "compact":
            slots = op.Range(0, op.Cast(op.Squeeze(most, [0]), to=INT64), 1)
            positions = op.Add(op.Unsqueeze(cache_length, [1]), slots)
            angles = rotation(op, step.inputs.frequencies, positions)
        elif routing.angles is not None:
            cos, sin = routing.angles
            angles = Rotation(op.Gather(cos, token), op.Gather(sin, token), of_every_position=False)
        if positions is None and architecture.needs_key_positions(layer):
            positions = op.Gather(op.Reshape(step.inputs.position_ids, [-1]), token)
        last = op.Add(op.Gather(routing.before_last, step.row_of(layer)), most)
        total = op.Add(op.ReduceMax(last, keepdims=0), 1)
        return LayerStep(
            position_ids=positions,
            rotation=angles,
            cache_length=cache_length,
            last_index=last,
            total_length=total,
            ragged=self,
        )

    def to_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """Return [N, features] as [B, C, features], C tokens per row, the layout that attention takes."""
        return op.Gather(x, self._of_slot)

    def to_line(self, op: Any, x: ir.Value, features: int) -> ir.Value:
        """Return [B, C, features] as [N, features], without padding."""
        return op.Gather(op.Reshape(x, [-1, features]), self._of_token)

    def scores(self, op: Any) -> ir.Value:
        return op.Gather(op.Reshape(self._route.score, [-1, 1]), self._index)

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        after = op.ScatterND(self._before, op.Unsqueeze(self._index, [1]), output)
        return op.Reshape(after, self._routing.shape)


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

    def scores(self, op: Any) -> ir.Value:
        return op.Unsqueeze(op.GatherElements(op.Squeeze(self._route.score, [0]), self._index, axis=1), [2])

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        assert self._route.rank is not None
        last = op.Sub(op.Shape(self._index, start=1, end=2), 1)
        rank = op.Min(op.Max(op.Sub(op.Squeeze(self._route.rank, [0]), 1), 0), last)
        of_token = op.GatherND(output, op.Unsqueeze(rank, [2]), batch_dims=1)
        return op.Where(op.Unsqueeze(op.Squeeze(self._route.chosen, [0]), [2]), of_token, self._before)

    def add(self, op: Any, gate: ir.Value, output: ir.Value) -> ir.Value:
        if not self._target.plugins:
            return super().add(op, gate, output)
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
        self._cache_length, self._target = cache_length, routing.target

    def any(self, op: Any) -> ir.Value:
        """Return whether any row runs, a bool scalar; as a number, because TensorRT's ReduceMax takes no booleans."""
        return op.Greater(op.ReduceMax(op.Cast(self._route.chosen, to=INT32), keepdims=0), 0)

    def no_entries(self, op: Any, cache: LayerCache) -> LayerCache:
        """Return zeros as the entries of a layer that does not run; the cache's length does not count them."""
        assert cache.key.shape is not None
        features = cache.key.shape[1] * cache.key.shape[3]
        shape = op.Concat(op.Shape(self.hidden_states, start=0, end=2), [features], axis=0)
        zeros = cast(op, op.Expand(op.Constant(value_float=0.0), shape), self._target.activations)
        return LayerCache(zeros, zeros)

    def append(self, op: Any, cache: LayerCache, entries: LayerCache) -> LayerCache:
        """Return the cache with every row's entry appended; only chosen rows' entries count."""
        key, value = (
            self._target.append(op, past, new, self._cache_length)
            for past, new in ((cache.key, entries.key), (cache.value, entries.value))
        )
        if cache.position is None:
            return LayerCache(key, value)
        assert self.step.position_ids is not None
        position = self._target.append_positions(op, cache.position, self.step.position_ids, self._cache_length)
        return LayerCache(key, value, position)

    def scores(self, op: Any) -> ir.Value:
        return op.Transpose(self._route.score, perm=[1, 2, 0])

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        return op.Where(op.Transpose(self._route.chosen, perm=[1, 2, 0]), output, self.hidden_states)


def combined(op: Any, contract: Mod, compacted: Compacted, output: ir.Value) -> ir.Value:
    """Return hidden states [B, S, hidden]: for chosen tokens y, g y or h + g (y - h) with the layer's output y."""
    if contract.gate == "none":
        return compacted.put_back(op, output)
    gate = compacted.scores(op)
    gate = op.Sigmoid(gate) if contract.gate == "sigmoid" else gate
    if contract.combine == "delta":
        return compacted.add(op, gate, output)
    return compacted.put_back(op, cast(op, op.Mul(gate, cast(op, output, FLOAT)), output.dtype))


__all__ = ["Compacted", "EveryRow", "Padded", "Ragged", "combined"]
