"""Routing inside the graph: which tokens a routed layer runs, their way into the layer and back.

Everything of one layer is [1, B, S], so that the graph's outputs are one concatenation of all layers'; what does not
depend on a layer's scores is computed once for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import either
from dynexport.exporter.graph.gate import gated
from dynexport.exporter.graph.layers import PLAIN, Linear
from dynexport.exporter.graph.selection import capacity, chosen_first
from dynexport.exporter.graph.step import (
    FLOAT,
    INT32,
    INT64,
    Frequencies,
    LayerCache,
    LayerStep,
    Rotation,
    Step,
    rotation,
)
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target, cast
from dynexport.runtime.bundle.contract import Mod

# What top-k decides, beside 0 for "left to the router" and infinity for "made to run".
_RANKED = 1e30


@dataclass(frozen=True)
class Route:
    """One layer's decisions of a step.

    Attributes:
        score: float32 [1, B, S], the router's r.
        logit: float32 [1, B, S], what the causal rule looks at.
        wanted: bool [1, B, S], before the cache's room is looked at.
        chosen: bool [1, B, S], those that run.
        rank: int64 [1, B, S], how many of the row's tokens up to this one are wanted; None where there is room for all.
        rank_margin: float32 [1, B, S], a score's distance to the other side of top-k; None without top-k.
    """

    score: ir.Value
    logit: ir.Value
    wanted: ir.Value
    chosen: ir.Value
    rank: ir.Value | None
    rank_margin: ir.Value | None


@dataclass(frozen=True)
class Routing:
    """A routed graph's further inputs, what follows from them for all layers, and what its layers decide.

    A decode step is many small operators beside few large ones, and each costs about 8 us: what can be shared is.

    Attributes:
        target: which engine's operators.
        padded: routed layers run ``most`` tokens of every row, so that no shape depends on what was chosen.
        token_counts: int64 [B], how many of the S tokens are real; the others are padding and take no slot.
        is_prompt: bool scalar: choose by top-k; None in a graph that always decides causally.
        real: bool [1, B, S].
        places: int64 [S], 0, 1, 2, ..
        told: by layer float32 [1, B, S], added to what is compared with the threshold: infinity makes a token run,
            minus infinity makes it skip, 0 leaves it to the router.
        room: by layer int64 [1, B, 1], entries that still fit into its cache; None where all always do.
        most: int64 [1], tokens of a row that a padded graph has room for in a step.
        one_row: bool scalar.
        shape: int64 [3], of hidden states.
        before_last: int32 [L, B], cache_lengths - 1.
        angles: cos and sin of every token, float32 [B * S, rotary dim / 2]; None where tokens are told other positions.
        routes: the decisions so far, one for every routed layer.
    """

    contract: Mod
    target: Target
    padded: bool
    token_counts: ir.Value
    is_prompt: ir.Value | None
    real: ir.Value
    places: ir.Value
    told: dict[int, ir.Value]
    room: dict[int, ir.Value] | None
    most: ir.Value
    one_row: ir.Value
    shape: ir.Value
    before_last: ir.Value
    angles: tuple[ir.Value, ir.Value] | None
    routes: list[Route] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        op: Any,
        architecture: Architecture,
        contract: Mod,
        plan: GraphPlan,
        step_inputs: StepInputs,
        target: Target,
    ) -> Routing:
        """Compute what all layers share."""
        given, slots = step_inputs, contract.slots(architecture.max_length)
        length = op.Shape(given.forced_routes, start=2, end=3)
        places = op.Range(0, op.Squeeze(length, [0]), 1)
        real = op.Less(op.Unsqueeze(places, [0, 1]), op.Unsqueeze(given.token_counts, [0, 2]))
        told = op.Where(op.Less(given.forced_routes, 0), 0.0, _told(op, op.Greater(given.forced_routes, 0)))
        most = op.Min(length, slots)
        if contract.prefill == "topk":
            most = op.Min(capacity(op, contract.capacity, contract.rounding, length), most)
        room = None
        if plan.padded or slots < architecture.max_length:
            rows = [plan.layers.index(layer) for layer in contract.routed_layers]
            room = _by_layer(op, contract, op.Sub(slots, op.Unsqueeze(op.Gather(given.cache_lengths, rows), [2])))
        return cls(
            contract,
            target,
            plan.padded,
            given.token_counts,
            given.is_prompt,
            real,
            places,
            _by_layer(op, contract, op.Where(real, told, -math.inf)),
            room,
            most,
            op.Equal(op.Squeeze(op.Shape(given.forced_routes, start=1, end=2), [0]), 1),
            op.Concat(op.Shape(given.forced_routes, start=1, end=3), [architecture.hidden_size], axis=0),
            op.Cast(op.Sub(given.cache_lengths, 1), to=INT32),
            None if contract.positions == "compact" else _angles(op, given),
        )


@dataclass(frozen=True)
class StepInputs:
    """What a routed graph is told.

    Attributes:
        position_ids: int64 [B, S].
        inverse_frequencies: of rotary angles, or None.
        cache_lengths: int64 [L, B].
        token_counts: int64 [B].
        forced_routes: int64 [R, B, S], 1 and 0 force a decision, -1 leaves it to the router.
        is_prompt: bool scalar, or None.
    """

    position_ids: ir.Value
    inverse_frequencies: Frequencies | None
    cache_lengths: ir.Value
    token_counts: ir.Value
    forced_routes: ir.Value
    is_prompt: ir.Value | None


def _told(op: Any, runs: ir.Value) -> ir.Value:
    return op.Where(runs, math.inf, -math.inf)


def _by_layer(op: Any, contract: Mod, stacked: ir.Value) -> dict[int, ir.Value]:
    """[R, ..] as [1, ..] of every routed layer."""
    layers = contract.routed_layers
    if len(layers) == 1:
        return {layers[0]: stacked}
    parts = op.Split(stacked, axis=0, num_outputs=len(layers), _outputs=len(layers))
    return dict(zip(layers, parts, strict=True))


def _angles(op: Any, given: StepInputs) -> tuple[ir.Value, ir.Value] | None:
    found = rotation(op, given.inverse_frequencies, op.Reshape(given.position_ids, [-1]))
    return None if found is None else (found.cos, found.sin)


class Predictor(nn.Module):
    """fc2(silu(fc1(x))): the causal stand-in for top-k (arXiv 2404.02258, section 3.5)."""

    def __init__(self, target: Target, hidden: int, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(target, hidden, width, bias=True, storage=PLAIN)
        self.fc2 = Linear(target, width, 1, bias=True, storage=PLAIN)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """x [B, S, hidden] -> logits [B, S, 1]."""
        inner = self.fc1(op, x)
        return self.fc2(op, op.Mul(inner, op.Sigmoid(inner)))


def decide(op: Any, layer: int, score: ir.Value, logit: ir.Value, routing: Routing) -> Route:
    """The decisions of a routed layer; never one for padding, never more than its cache has room for.

    Args:
        score, logit: float32 [B, S, 1].
    """
    contract = routing.contract
    score, same = op.Transpose(score, perm=[2, 0, 1]), score is logit
    logit = score if same else op.Transpose(logit, perm=[2, 0, 1])
    told, margin = routing.told[layer], None
    wanted = _causal(op, contract, layer, logit, told)
    if routing.is_prompt is not None:
        ranked, margin = _top_k(op, contract, score, routing)
        by_rank = op.Greater(op.Add(op.Where(ranked, _RANKED, -_RANKED), told), 0.0)
        # Where has no kernel for booleans in ONNX Runtime.
        wanted = op.Or(op.And(routing.is_prompt, by_rank), op.And(op.Not(routing.is_prompt), wanted))
    chosen, rank = wanted, None
    if routing.room is not None:
        rank = op.CumSum(op.Cast(wanted, to=INT64), 2)
        chosen = op.And(wanted, op.LessOrEqual(rank, routing.room[layer]))
    if routing.padded:
        chosen = op.And(chosen, op.LessOrEqual(rank, routing.most))
    route = Route(score, logit, wanted, chosen, rank, margin)
    routing.routes.append(route)
    return route


def _causal(op: Any, contract: Mod, layer: int, logit: ir.Value, told: ir.Value) -> ir.Value:
    if contract.decision.rule == "always":
        return op.Greater(told, -1.0)
    compare = op.Greater if contract.decision.comparison == ">" else op.GreaterOrEqual
    return compare(op.Add(op.Sigmoid(logit), told), float(contract.threshold(layer)))


def _top_k(op: Any, contract: Mod, score: ir.Value, routing: Routing) -> tuple[ir.Value, ir.Value]:
    """The k best of each row's own real tokens, lower position first on ties; and each one's distance to the others."""
    counts, most = (
        capacity(op, contract.capacity, contract.rounding, tokens)
        for tokens in (routing.token_counts, op.Shape(score, start=2, end=3))
    )
    masked = op.Where(routing.real, score, float("-inf"))
    places, runs = routing.target.top_k(op, op.Squeeze(masked, [0]), counts, most)
    nobody = op.Mul(op.Cast(op.Squeeze(routing.real, [0]), to=INT64), 0)
    chosen = op.Unsqueeze(op.Greater(op.ScatterElements(nobody, places, runs, axis=1), 0), [0])
    worst_in = op.ReduceMin(op.Where(chosen, score, float("inf")), [2])
    best_out = op.ReduceMax(op.Where(chosen, float("-inf"), masked), [2])  # nobody is out where all are in
    return chosen, op.Where(chosen, op.Sub(score, best_out), op.Sub(worst_in, score))


class Compacted(ABC):
    """The chosen tokens on their way through a layer: ``hidden_states``, and what the layer has to know of them."""

    hidden_states: ir.Value
    step: LayerStep

    @abstractmethod
    def scores(self, op: Any) -> ir.Value:
        """Their scores, to be multiplied with hidden states."""

    @abstractmethod
    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        """Hidden states [B, S, hidden] with those of the chosen tokens replaced."""

    def add(self, op: Any, gate: ir.Value, output: ir.Value) -> ir.Value:
        """Hidden states [B, S, hidden] with h + g (y - h) for those of the chosen tokens; g float32, y ``output``."""
        return self.put_back(op, gated(op, self.hidden_states, output, gate))


class Ragged(Compacted):
    """Exactly the chosen tokens, N of all rows in one line: [N, hidden]. Attention alone wants rows.

    There is at least one.
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
        """Places in the line of the c-th token of a row, int64 [B, C]; and among all rows' slots of a token, int64 [N].

        Rows with fewer tokens repeat others' there, in slots that are not counted.
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
        cache_length = op.Gather(step.cache_lengths, step.row_of(layer))
        positions = angles = None
        if routing.contract.positions == "compact":
            slots = op.Range(0, op.Cast(op.Squeeze(most, [0]), to=INT64), 1)
            positions = op.Add(op.Unsqueeze(cache_length, [1]), slots)
            angles = rotation(op, step.inverse_frequencies, positions)
        elif routing.angles is not None:
            cos, sin = routing.angles
            angles = Rotation(op.Gather(cos, token), op.Gather(sin, token), of_every_position=False)
        if positions is None and architecture.needs_key_positions(layer):
            positions = op.Gather(op.Reshape(step.position_ids, [-1]), token)
        last = op.Add(op.Gather(routing.before_last, step.row_of(layer)), most)
        total = op.Add(op.ReduceMax(last, keepdims=0), 1)
        return LayerStep(positions, angles, cache_length, last, total, ragged=self)

    def to_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """[N, features] -> [B, C, features], C tokens of every row, as attention wants them."""
        return op.Gather(x, self._of_slot)

    def to_line(self, op: Any, x: ir.Value, features: int) -> ir.Value:
        """[B, C, features] -> [N, features]."""
        return op.Gather(op.Reshape(x, [-1, features]), self._of_token)

    def scores(self, op: Any) -> ir.Value:
        return op.Gather(op.Reshape(self._route.score, [-1, 1]), self._index)

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        after = op.ScatterND(self._before, op.Unsqueeze(self._index, [1]), output)
        return op.Reshape(after, self._routing.shape)


class Padded(Compacted):
    """Room for ``most`` tokens of every row, the chosen ones first: [B, most, hidden]. No shape depends on a choice."""

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self._before, self._route, self._target = hidden_states, route, routing.target
        self._index = chosen_first(op, op.Squeeze(route.chosen, [0]), routing.places, routing.most)
        self.hidden_states = op.GatherND(hidden_states, op.Unsqueeze(self._index, [2]), batch_dims=1)
        positions = op.GatherElements(step.position_ids, self._index, axis=1)
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
    """What the layer has to know of ``most`` tokens of every row at ``positions`` int64 [B, most]."""
    cache_length = op.Gather(step.cache_lengths, step.row_of(layer))
    lengths = op.Add(cache_length, routing.most)
    fixed_slots = step.total_length is None
    if routing.contract.positions == "compact":
        positions = op.Add(op.Unsqueeze(cache_length, [1]), op.Range(0, op.Squeeze(routing.most, [0]), 1))
    return LayerStep(
        positions,
        rotation(op, step.inverse_frequencies, positions),
        cache_length,
        op.Cast(op.Sub(lengths, 1), to=INT32),
        None if fixed_slots else op.Cast(op.ReduceMax(lengths, keepdims=0), to=INT32),
    )


class EveryRow(Compacted):
    """The one token of every row, whether it was chosen or not: [B, 1, hidden]."""

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self.hidden_states, self._route = hidden_states, route
        positions, angles = step.position_ids, step.rotation
        cache_length, last = (op.Gather(values, step.row_of(layer)) for values in (step.cache_lengths, step.last_index))
        if routing.contract.positions == "compact":
            positions = op.Expand(op.Unsqueeze(cache_length, [1]), op.Shape(step.position_ids))
            angles = rotation(op, step.inverse_frequencies, positions)
        self.step = LayerStep(positions, angles, cache_length, last, None, append_later=True)

        self._cache_length, self._target = cache_length, routing.target

    def any(self, op: Any) -> ir.Value:
        """bool scalar, whether any row runs; counted, for TensorRT's ReduceMax takes no booleans."""
        return op.Greater(op.ReduceMax(op.Cast(self._route.chosen, to=INT32), keepdims=0), 0)

    def no_entries(self, op: Any, cache: LayerCache) -> LayerCache:
        """What rows have for entries of a layer that does not run: zeros, in slots that are not counted."""
        assert cache.key.shape is not None
        features = cache.key.shape[1] * cache.key.shape[3]
        shape = op.Concat(op.Shape(self.hidden_states, start=0, end=2), [features], axis=0)
        zeros = cast(op, op.Expand(op.Constant(value_float=0.0), shape), self._target.activations)
        return LayerCache(zeros, zeros)

    def append(self, op: Any, cache: LayerCache, entries: LayerCache) -> LayerCache:
        """The cache with every row's entry behind those in use, counted or not."""
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
    """Hidden states [B, S, hidden], of chosen tokens after the layer: y, g y or h + g (y - h) for its output y."""
    if contract.gate == "none":
        return compacted.put_back(op, output)
    gate = compacted.scores(op)
    gate = op.Sigmoid(gate) if contract.gate == "sigmoid" else gate
    if contract.combine == "delta":
        return compacted.add(op, gate, output)
    return compacted.put_back(op, cast(op, op.Mul(gate, cast(op, output, FLOAT)), output.dtype))


def outputs(op: Any, routing: Routing) -> dict[str, ir.Value]:
    """The graph's outputs: routes bool and route_scores, route_margins float32 [R, B, S], overflow int64 [R, B]."""

    def stacked(part: str) -> ir.Value:
        return op.Concat(*(getattr(route, part) for route in routing.routes), axis=0)

    contract, chosen = routing.contract, stacked("chosen")
    thresholds = np.array([contract.threshold(layer) for layer in contract.routed_layers], np.float32)
    constant = op.initializer(ir.tensor(thresholds[:, None, None]), "route_thresholds")
    margins = op.Abs(op.Sub(op.Sigmoid(stacked("logit")), constant))
    if routing.is_prompt is not None:
        margins = op.Where(routing.is_prompt, stacked("rank_margin"), margins)
    left_out = op.Cast(op.Xor(stacked("wanted"), chosen), to=INT64)
    return {
        "routes": chosen,
        "route_scores": stacked("score"),
        "route_margins": margins,
        "overflow": op.ReduceSum(left_out, [2], keepdims=0),
    }


__all__ = [
    "Compacted",
    "EveryRow",
    "Padded",
    "Predictor",
    "Ragged",
    "Route",
    "Routing",
    "StepInputs",
    "combined",
    "decide",
    "outputs",
]
