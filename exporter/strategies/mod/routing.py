"""Write the routing decisions into the graph: which tokens a routed layer runs.

Every value of a layer is [1, B, S], so that one concatenation over layers gives a graph output. Values that do not
depend on a layer's scores are computed once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.layers import Linear
from dynexport.exporter.graph.selection import capacity
from dynexport.exporter.graph.step import BOOL, INT32, INT64, StepInputs, rotation
from dynexport.exporter.graph.values import add_input
from dynexport.exporter.lowering.target import Target, cast
from dynexport.exporter.strategies.mod.gates import strength_of
from dynexport.exporter.strategies.mod.plan import RoutedPlan
from dynexport.plugins.routes import route_tokens
from dynexport.runtime.bundle.contract import Mod

# The value of a top-k decision; it is added to a forced decision, which is infinity, minus infinity or 0 for none.
_RANKED = 1e30


@dataclass(frozen=True)
class Route:
    """One layer's decisions in a call.

    Attributes:
        score: float32 [B, S, 1], the router's r.
        logit: float32 [B, S, 1], the input of the causal rule.
        strength: float32 [B, S, 1], what gates are functions of: sigmoid(r), or r itself where the gate is raw.
        wanted: bool [1, B, S], the decision without regard to the cache's capacity.
        chosen: bool [1, B, S], true for tokens that run.
        rank: int64 [1, B, S], number of the row's wanted tokens up to and including this one; None where the cache
            always has room.
        rank_margin: float32 [1, B, S], a score's distance to the other side of top-k; None without top-k.
        anybody: bool scalar, whether any token runs; None where it has not been computed.
    """

    score: ir.Value
    logit: ir.Value
    strength: ir.Value
    wanted: ir.Value
    chosen: ir.Value
    rank: ir.Value | None
    rank_margin: ir.Value | None
    anybody: ir.Value | None = None


@dataclass(frozen=True)
class Routing:
    """The routing inputs of a graph, the values that all layers share, and the layers' decisions.

    A decode step has many small operators, each of which costs about 8 us, so layers share values where they can.

    Attributes:
        contract: the bundle's contract.
        target: the engine that the graph is written for.
        padded: true if routed layers run ``most`` tokens of every row, so that no shape depends on a decision.
        at_once: true if one operator computes a router's score and decisions.
        token_counts: int64 [B], number of real tokens among S; the others are padding and take no slot.
        is_prompt: bool scalar, true chooses by top-k; None in a graph that always decides causally.
        real: bool [1, B, S], false for padding.
        places: int64 [S], 0, 1, 2, ..
        told: the forced decisions by number, float32 [1, B, S], added to the compared value: infinity to run, minus
            infinity to skip, 0 to leave it to the router.
        room: by number of the routed layer int64 [1, B, 1], number of entries that still fit into its cache; None
            where all always do.
        most: int64 [1], the largest number of a row's tokens that a padded layer runs.
        one_row: bool scalar, true where B is 1.
        one_token: bool scalar, true where S is 1.
        no_projection: zeros [B, 1, features] in place of a layer's packed query, key and value.
        before_last: int32 [L, B], cache_lengths - 1.
        angles: cos and sin of every token, float32 [B * S, rotary dim / 2]; None with compact positions.
        routes: the decisions so far, in the order of the routed layers.
    """

    contract: Mod
    target: Target
    padded: bool
    at_once: bool
    token_counts: ir.Value
    is_prompt: ir.Value | None
    real: ir.Value
    places: ir.Value
    told: Sequence[ir.Value]
    room: Sequence[ir.Value] | None
    most: ir.Value
    one_row: ir.Value
    one_token: ir.Value
    no_projection: ir.Value
    before_last: ir.Value
    angles: tuple[ir.Value, ir.Value] | None
    routes: list[Route] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        op: Any,
        architecture: Architecture,
        contract: Mod,
        plan: RoutedPlan,
        target: Target,
        step: StepInputs,
        told: RoutedInputs,
    ) -> Routing:
        """Write the values that all layers share."""
        slots = contract.slots(architecture.max_length)
        rows, length = (op.Shape(told.forced_routes, start=axis, end=axis + 1) for axis in (1, 2))
        projected = op.Concat(rows, [1, architecture.of(contract.routed_layers[0]).projected_size], axis=0)
        places = op.Range(0, op.Squeeze(length, [0]), 1)
        real = op.Less(op.Unsqueeze(places, [0, 1]), op.Unsqueeze(told.token_counts, [0, 2]))
        undecided = 0.0
        if contract.keep_first:
            kept = op.Less(op.Unsqueeze(step.position_ids, [0]), contract.keep_first)
            undecided = op.Where(kept, math.inf, 0.0)
        decided = op.Where(op.Less(told.forced_routes, 0), undecided, _decided(op, op.Greater(told.forced_routes, 0)))
        most = op.Min(length, slots)
        if contract.prefill == "topk":
            most = op.Min(capacity(op, contract.capacity, contract.rounding, length), most)
        room = None
        at_once = (
            target.routes_at_once
            and contract.decision.rule == "router"
            and told.is_prompt is None
            and not plan.padded
            and contract.router.kind == "linear"
            and contract.level == "token"
            and contract.decisions_per_layer == 1
        )
        if plan.padded or at_once or slots < architecture.max_length:
            places_of_layers = [plan.layers.index(layer) for layer in contract.routed_layers]
            lengths = op.Gather(step.cache_lengths, places_of_layers)
            room = _apart(op, len(contract.routed_layers), op.Sub(slots, op.Unsqueeze(lengths, [2])))
        return cls(
            contract=contract,
            target=target,
            padded=plan.padded,
            token_counts=told.token_counts,
            is_prompt=told.is_prompt,
            real=real,
            places=places,
            at_once=at_once,
            told=_apart(op, decisions(contract), op.Where(real, decided, -math.inf)),
            room=room,
            most=most,
            one_row=op.Equal(op.Squeeze(rows, [0]), 1),
            one_token=op.Equal(op.Squeeze(length, [0]), 1),
            no_projection=cast(op, op.Expand(op.Constant(value_float=0.0), projected), target.activations),
            before_last=op.Cast(op.Sub(step.cache_lengths, 1), to=INT32),
            angles=None if contract.positions == "compact" else _angles(op, step),
        )

    def layer_of(self, number: int) -> int:
        """Return the layer that a decision is about."""
        return self.contract.routed_layers[number // self.contract.decisions_per_layer]


@dataclass(frozen=True)
class RoutedInputs:
    """The inputs of a routed graph beside those of every whole-step graph.

    Attributes:
        token_counts: int64 [B], number of real tokens of each row.
        forced_routes: int64 [R, B, S], 1 to run, 0 to skip, -1 to leave it to the router.
        is_prompt: bool scalar where prompts choose by top-k, else None.
    """

    token_counts: ir.Value
    forced_routes: ir.Value
    is_prompt: ir.Value | None

    @classmethod
    def add(cls, graph: ir.Graph, contract: Mod, plan: RoutedPlan) -> RoutedInputs:
        """Add the inputs to a graph."""
        ranks_prompts = contract.prefill == "topk" and not plan.only_decodes
        return cls(
            token_counts=add_input(graph, "token_counts", INT64, ["B"]),
            forced_routes=add_input(graph, "forced_routes", INT64, [decisions(contract), "B", "S"]),
            is_prompt=add_input(graph, "is_prompt", BOOL, []) if ranks_prompts else None,
        )


def _decided(op: Any, runs: ir.Value) -> ir.Value:
    return op.Where(runs, math.inf, -math.inf)


def decisions(contract: Mod) -> int:
    """Return R, the number of decisions about a token."""
    return len(contract.routed_layers) * contract.decisions_per_layer


def _apart(op: Any, count: int, stacked: ir.Value) -> Sequence[ir.Value]:
    """Split [count, ..] into [1, ..]."""
    if count == 1:
        return [stacked]
    parts: Sequence[ir.Value] = op.Split(stacked, axis=0, num_outputs=count, _outputs=count)
    return parts


def _angles(op: Any, step: StepInputs) -> tuple[ir.Value, ir.Value] | None:
    found = rotation(op, step.frequencies, op.Reshape(step.position_ids, [-1]))
    return None if found is None else (found.cos, found.sin)


def decide(op: Any, score: ir.Value, logit: ir.Value, routing: Routing) -> Route:
    """Return a routed layer's next decisions; padding never runs, nor do tokens that the cache has no room for.

    Args:
        op: writes operators into the graph.
        score: the router's r, float32 [B, S, 1].
        logit: the input of the causal rule, float32 [B, S, 1].
        routing: the shared values; the decisions are appended to its routes.
    """
    contract = routing.contract
    number, margin = len(routing.routes), None
    told, about_entries = routing.told[number], number % contract.decisions_per_layer == 0
    probability = op.Sigmoid(logit)
    wanted = _causal(op, contract, routing.layer_of(number), op.Transpose(probability, perm=[2, 0, 1]), told)
    if routing.is_prompt is not None:
        ranked, margin = _top_k(op, contract, op.Transpose(score, perm=[2, 0, 1]), routing)
        by_rank = op.Greater(op.Add(op.Where(ranked, _RANKED, -_RANKED), told), 0.0)
        # Where has no kernel for booleans in ONNX Runtime.
        wanted = op.Or(op.And(routing.is_prompt, by_rank), op.And(op.Not(routing.is_prompt), wanted))
    chosen, rank = wanted, None
    if routing.room is not None and about_entries:
        rank = op.CumSum(op.Cast(wanted, to=INT64), 2)
        chosen = op.And(wanted, op.LessOrEqual(rank, routing.room[number // contract.decisions_per_layer]))
    if routing.padded:
        chosen = op.And(chosen, op.LessOrEqual(rank, routing.most))
    route = Route(
        score=score,
        logit=logit,
        strength=strength_of(op, contract, score, probability if logit is score else None),
        wanted=wanted,
        chosen=chosen,
        rank=rank,
        rank_margin=margin,
    )
    routing.routes.append(route)
    return route


def decide_at_once(op: Any, x: ir.Value, router: Linear, routing: Routing) -> Route:
    """Return a routed layer's next decisions by one operator; see ``Routing.at_once``.

    Args:
        op: writes operators into the graph.
        x: the router's input, float32 [B, S, hidden].
        router: the layer's router.
        routing: the shared values; the decisions are appended to its routes.
    """
    contract, number = routing.contract, len(routing.routes)
    assert routing.room is not None
    score, wanted, chosen, anybody = route_tokens(
        op,
        x,
        router.weight,
        router.bias if router.has_bias else op.Constant(value_floats=[0.0]),
        op.Constant(value_float=float(contract.threshold(routing.layer_of(number)))),
        routing.told[number],
        routing.room[number],
        inclusive=contract.decision.comparison == ">=",
    )
    route = Route(
        score=score,
        logit=score,
        strength=strength_of(op, contract, score, None),
        wanted=wanted,
        chosen=chosen,
        rank=None,
        rank_margin=None,
        anybody=anybody,
    )
    routing.routes.append(route)
    return route


def _causal(op: Any, contract: Mod, layer: int, probability: ir.Value, told: ir.Value) -> ir.Value:
    if contract.decision.rule == "always":
        return op.Greater(told, -1.0)
    compare = op.Greater if contract.decision.comparison == ">" else op.GreaterOrEqual
    return compare(op.Add(probability, told), float(contract.threshold(layer)))


def _top_k(op: Any, contract: Mod, score: ir.Value, routing: Routing) -> tuple[ir.Value, ir.Value]:
    """Return the k best of each row's real tokens, lower position first on ties, and each score's margin."""
    counts, most = (
        capacity(op, contract.capacity, contract.rounding, tokens)
        for tokens in (routing.token_counts, op.Shape(score, start=2, end=3))
    )
    masked = op.Where(routing.real, score, float("-inf"))
    places, runs = routing.target.top_k(op, op.Squeeze(masked, [0]), counts, most)
    nobody = op.Mul(op.Cast(op.Squeeze(routing.real, [0]), to=INT64), 0)
    chosen = op.Unsqueeze(op.Greater(op.ScatterElements(nobody, places, runs, axis=1), 0), [0])
    if contract.boundary == "k-1":
        last = op.ReduceMin(op.Where(chosen, score, float("inf")), [2])
        alone = op.Unsqueeze(op.Equal(counts, 1), [0, 2])
        equal = op.And(alone, op.Equal(masked, last))
        chosen = op.And(op.Or(op.Greater(masked, last), equal), routing.real)
    worst_in = op.ReduceMin(op.Where(chosen, score, float("inf")), [2])
    best_out = op.ReduceMax(op.Where(chosen, float("-inf"), masked), [2])  # minus infinity where all are chosen
    return chosen, op.Where(chosen, op.Sub(score, best_out), op.Sub(worst_in, score))


def outputs(op: Any, routing: Routing) -> dict[str, ir.Value]:
    """Return the graph's routing outputs.

    They are routes bool, route_scores and route_margins float32, all [R, B, S], and overflow int64 [R, B].
    """

    def stacked(part: str) -> ir.Value:
        return op.Concat(*(getattr(route, part) for route in routing.routes), axis=0)

    def turned(part: str) -> ir.Value:
        """Stack [B, S, 1] of every layer to [R, B, S]."""
        return op.Transpose(op.Concat(*(getattr(route, part) for route in routing.routes), axis=2), perm=[2, 0, 1])

    contract, chosen = routing.contract, stacked("chosen")
    numbers = range(len(routing.routes))
    thresholds = np.array([contract.threshold(routing.layer_of(number)) for number in numbers], np.float32)
    constant = op.initializer(ir.tensor(thresholds[:, None, None]), "route_thresholds")
    margins = op.Abs(op.Sub(op.Sigmoid(turned("logit")), constant))
    if routing.is_prompt is not None:
        margins = op.Where(routing.is_prompt, stacked("rank_margin"), margins)
    left_out = op.Cast(op.Xor(stacked("wanted"), chosen), to=INT64)
    return {
        "routes": chosen,
        "route_scores": turned("score"),
        "route_margins": margins,
        "overflow": op.ReduceSum(left_out, [2], keepdims=0),
    }


__all__ = ["Route", "RoutedInputs", "Routing", "decide", "decide_at_once", "decisions", "outputs"]
