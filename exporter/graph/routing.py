"""Routing inside the graph: which tokens a routed layer runs, their way into the layer and back.

Everything of one layer is [1, B, S], so that the graph's outputs are one concatenation of all layers'; what does not
depend on a layer's scores is computed once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.graph.layers import PLAIN, Linear
from dynexport.exporter.graph.step import INT32, INT64, LayerStep, Step, rotation
from dynexport.exporter.targets.target import Target
from dynexport.runtime.contract import Mod


@dataclass(frozen=True)
class Route:
    """One layer's decisions of a step.

    Attributes:
        score: float32 [1, B, S], the router's r.
        logit: float32 [1, B, S], what the causal rule looks at.
        wanted: bool [1, B, S], before the cache's room is looked at.
        chosen: bool [1, B, S], those that run.
        rank: int64 [1, B, S], how many of the row's tokens up to this one are wanted.
        rank_margin: float32 [1, B, S], a score's distance to the other side of top-k; None without top-k.
    """

    score: ir.Value
    logit: ir.Value
    wanted: ir.Value
    chosen: ir.Value
    rank: ir.Value
    rank_margin: ir.Value | None


@dataclass(frozen=True)
class Routing:
    """A routed graph's further inputs, what follows from them for all layers, and what its layers decide.

    Attributes:
        padded: routed layers run ``most`` tokens of every row, so that no shape depends on what was chosen.
        token_counts: int64 [B], how many of the S tokens are real; the others are padding and take no slot.
        is_prompt: bool scalar: choose by top-k; None in a graph that always decides causally.
        real: bool [1, B, S].
        places: int64 [S], 0, 1, 2, ..
        free, forced: bool [R, B, S], left to the router; made to run. R counts routed layers.
        room: int64 [R, B, 1], entries that still fit into a layer's cache.
        most: int64 [1], tokens of a row that a padded graph has room for in a step.
        routes: the decisions so far, one for every routed layer.
    """

    contract: Mod
    padded: bool
    token_counts: ir.Value
    is_prompt: ir.Value | None
    real: ir.Value
    places: ir.Value
    free: ir.Value
    forced: ir.Value
    room: ir.Value
    most: ir.Value
    routes: list[Route] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        op: Any,
        contract: Mod,
        layers: tuple[int, ...],
        cache_lengths: ir.Value,
        token_counts: ir.Value,
        forced_routes: ir.Value,
        is_prompt: ir.Value | None,
        *,
        slots: int,
        padded: bool,
    ) -> Routing:
        """Compute what all layers share.

        Args:
            layers: the layers of the graph: the rows of cache_lengths.
            cache_lengths: int64 [L, B].
            token_counts: int64 [B].
            forced_routes: int64 [R, B, S], 1 and 0 force a decision, -1 leaves it to the router.
            slots: entries that a row may have in a routed layer's cache.
        """
        length = op.Shape(forced_routes, start=2, end=3)
        places = op.Range(0, op.Squeeze(length, [0]), 1)
        real = op.Less(op.Unsqueeze(places, [0, 1]), op.Unsqueeze(token_counts, [0, 2]))
        rows = [layers.index(layer) for layer in contract.routed_layers]
        room = op.Sub(slots, op.Unsqueeze(op.Gather(cache_lengths, rows), [2]))
        most = op.Min(length, slots)
        if contract.prefill == "topk":
            most = op.Min(_capacity(op, contract, length), most)
        return cls(
            contract,
            padded,
            token_counts,
            is_prompt,
            real,
            places,
            op.And(op.Less(forced_routes, 0), real),
            op.And(op.Greater(forced_routes, 0), real),
            room,
            most,
        )


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
    place = [contract.routed_layers.index(layer)]
    shape = op.Concat([1], op.Shape(score, start=0, end=2), axis=0)
    score, same = op.Reshape(score, shape), score is logit
    logit = score if same else op.Reshape(logit, shape)
    decided, margin = _causal(op, contract, layer, logit), None
    if routing.is_prompt is not None:
        ranked, margin = _top_k(op, contract, score, routing)
        # Where has no kernel for booleans in ONNX Runtime.
        decided = op.Or(op.And(routing.is_prompt, ranked), op.And(op.Not(routing.is_prompt), decided))
    wanted = op.Or(op.And(op.Gather(routing.free, place), decided), op.Gather(routing.forced, place))
    rank = op.CumSum(op.Cast(wanted, to=INT64), 2)
    chosen = op.And(wanted, op.LessOrEqual(rank, op.Gather(routing.room, place)))
    if routing.padded:
        chosen = op.And(chosen, op.LessOrEqual(rank, routing.most))
    route = Route(score, logit, wanted, chosen, rank, margin)
    routing.routes.append(route)
    return route


def _causal(op: Any, contract: Mod, layer: int, logit: ir.Value) -> ir.Value:
    if contract.decision.rule == "always":
        return op.Equal(logit, logit)
    compare = op.Greater if contract.decision.comparison == ">" else op.GreaterOrEqual
    return compare(op.Sigmoid(logit), float(contract.threshold(layer)))


def _capacity(op: Any, contract: Mod, tokens: ir.Value) -> ir.Value:
    """k = max(1, rounding(capacity * tokens)): an integer expression, so that no length can be baked into it."""
    share = Fraction(str(contract.capacity))
    product = op.Mul(tokens, share.numerator)
    if contract.rounding == "ceil":
        product = op.Add(product, share.denominator - 1)
    return op.Max(op.Div(product, share.denominator), 1)


def _top_k(op: Any, contract: Mod, score: ir.Value, routing: Routing) -> tuple[ir.Value, ir.Value]:
    """The k best of each row's own real tokens, lower position first on ties; and each one's distance to the others."""
    k = op.Unsqueeze(_capacity(op, contract, routing.token_counts), [0, 2])
    length = op.Shape(score, start=2, end=3)
    values, order = op.TopK(op.Where(routing.real, score, float("-inf")), length, axis=2, sorted=1, _outputs=2)
    ranks = op.Expand(routing.places, op.Shape(score))
    rank = op.ScatterElements(op.Mul(order, 0), order, ranks, axis=2)
    chosen = op.Less(rank, k)
    worst_in = op.GatherElements(values, op.Sub(k, 1), axis=2)
    best_out = op.GatherElements(values, op.Min(k, op.Sub(length, 1)), axis=2)
    best_out = op.Where(op.Less(k, length), best_out, float("-inf"))  # nobody is out where all are in
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


class Ragged(Compacted):
    """Exactly the chosen tokens, N of all rows in one line: [1, N, hidden]. Attention alone wants rows.

    There is at least one.
    """

    def __init__(self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step) -> None:
        self._before, self._route = hidden_states, route
        chosen = op.Squeeze(route.chosen, [0])
        counts = op.ReduceSum(op.Cast(chosen, to=INT64), [1], keepdims=0)
        first = op.CumSum(counts, 0, exclusive=1)
        self._most = op.ReduceMax(counts, keepdims=1)
        row, place = op.Split(op.NonZero(chosen), axis=0, num_outputs=2, _outputs=2)
        self._index = op.Transpose(op.Concat(row, place, axis=0), perm=[1, 0])
        self.hidden_states = op.Unsqueeze(op.GatherND(hidden_states, self._index), [0])
        # Where the c-th token of a row stands in the line; rows with fewer repeat others' tokens, in slots not counted.
        slot = op.Range(0, op.Squeeze(self._most, [0]), 1)
        last = op.Sub(op.Shape(row, start=1, end=2), 1)
        self._of_slot = op.Min(op.Add(op.Unsqueeze(first, [1]), slot), last)
        # And where a token of the line stands among the slots of all rows.
        line = op.Range(0, op.Add(op.Squeeze(last, [0]), 1), 1)
        row = op.Squeeze(row, [0])
        self._of_token = op.Add(op.Mul(row, self._most), op.Sub(line, op.Gather(first, row)))
        positions = op.Gather(op.GatherND(step.position_ids, self._index), self._of_slot)
        self.step = _layer_step(op, layer, step, positions, self._most, self)

    def to_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """[1, N, features] -> [B, C, features], C tokens of every row, as attention wants them."""
        return op.Gather(op.Squeeze(x, [0]), self._of_slot)

    def to_line(self, op: Any, x: ir.Value, features: int) -> ir.Value:
        """[B, C, features] -> [1, N, features]."""
        return op.Unsqueeze(op.Gather(op.Reshape(x, [-1, features]), self._of_token), [0])

    def scores(self, op: Any) -> ir.Value:
        return op.Unsqueeze(op.GatherND(op.Squeeze(self._route.score, [0]), self._index), [0, 2])

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        return op.ScatterND(self._before, self._index, op.Squeeze(output, [0]))


class Padded(Compacted):
    """Room for ``most`` tokens of every row, the chosen ones first: [B, most, hidden]. No shape depends on a choice."""

    def __init__(
        self, op: Any, layer: int, route: Route, hidden_states: ir.Value, step: Step, routing: Routing
    ) -> None:
        self._before, self._route = hidden_states, route
        chosen = op.Squeeze(route.chosen, [0])
        length = op.Shape(chosen, start=1, end=2)
        # Chosen ones before the others, each in order: distinct keys, so that TopK is a stable partition.
        key = op.Sub(op.Where(chosen, op.Mul(length, 2), length), routing.places)
        _, self._index = op.TopK(key, routing.most, axis=1, sorted=1, _outputs=2)
        self.hidden_states = op.GatherND(hidden_states, op.Unsqueeze(self._index, [2]), batch_dims=1)
        positions = op.GatherElements(step.position_ids, self._index, axis=1)
        self.step = _layer_step(op, layer, step, positions, routing.most, None)

    def scores(self, op: Any) -> ir.Value:
        return op.Unsqueeze(op.GatherElements(op.Squeeze(self._route.score, [0]), self._index, axis=1), [2])

    def put_back(self, op: Any, output: ir.Value) -> ir.Value:
        last = op.Sub(op.Shape(self._index, start=1, end=2), 1)
        rank = op.Min(op.Max(op.Sub(op.Squeeze(self._route.rank, [0]), 1), 0), last)
        of_token = op.GatherND(output, op.Unsqueeze(rank, [2]), batch_dims=1)
        return op.Where(op.Unsqueeze(op.Squeeze(self._route.chosen, [0]), [2]), of_token, self._before)


def _layer_step(
    op: Any, layer: int, step: Step, positions: ir.Value, count: ir.Value, ragged: Ragged | None
) -> LayerStep:
    """What the layer has to know of ``count`` int64 [1] tokens of every row at ``positions`` int64 [B, count]."""
    assert step.routing is not None
    cache_length = op.Gather(step.cache_lengths, step.row_of(layer))
    lengths = op.Add(cache_length, count)
    if step.routing.contract.positions == "compact":
        positions = op.Add(op.Unsqueeze(cache_length, [1]), op.Range(0, op.Squeeze(count, [0]), 1))
    return LayerStep(
        positions,
        rotation(op, step.inverse_frequencies, positions),
        cache_length,
        op.Cast(op.Sub(lengths, 1), to=INT32),
        op.Cast(op.ReduceMax(lengths, keepdims=0), to=INT32),
        ragged=ragged,
    )


def gated(op: Any, contract: Mod, compacted: Compacted, output: ir.Value) -> ir.Value:
    """The layer's output y under the gate: h + g (y - h), or g y."""
    if contract.gate == "none":
        return output
    gate = compacted.scores(op)
    gate = op.Sigmoid(gate) if contract.gate == "sigmoid" else gate
    if contract.combine == "replace":
        return op.Mul(gate, output)
    before = compacted.hidden_states
    return op.Add(before, op.Mul(gate, op.Sub(output, before)))


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


__all__ = ["Compacted", "Padded", "Predictor", "Ragged", "Route", "Routing", "decide", "gated", "outputs"]
