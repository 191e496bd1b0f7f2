"""Record tokens' choices hop by hop within one graph, and write its path outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.graph.step import BOOL, FLOAT, INT64
from dynexport.exporter.graph.values import add_output, typed_value
from dynexport.exporter.strategies.radial.router import Router, choose
from dynexport.runtime.bundle.contract import Radial

_NOWHERE = -1


@dataclass(frozen=True)
class Decision:
    """The router's decision for all tokens in a hop.

    Attributes:
        asked: bool [T], true for tokens that have a choice.
        goes: bool [T], true for tokens that chose a layer.
        choice: int64 [T], undefined where ``asked`` is false.
        score: float32 [T], the choice's score.
        margin: float32 [T], the distance from the best to the second-best score.
        probability: float32 [T] with a gate, else None.
    """

    asked: ir.Value
    goes: ir.Value
    choice: ir.Value
    score: ir.Value
    margin: ir.Value
    probability: ir.Value | None

    def path(self, op: Any) -> ir.Value:
        """Return the choice, int64 [T]; -1 where ``asked`` is false."""
        return op.Where(self.asked, self.choice, _NOWHERE)


class Paths:
    """The paths of T concatenated tokens.

    Args:
        op: writes operators into the graph.
        contract: the bundle's contract.
        layers: number of layers in the pool.
        alive: bool [T], false for padding.
    """

    def __init__(self, op: Any, contract: Radial, layers: int, alive: ir.Value) -> None:
        self._op, self._contract, self._layers, self._alive = op, contract, layers, alive
        self._choices = op.initializer(ir.tensor(np.arange(contract.choices(layers))[None]), "choices")
        self._visited: ir.Value | None = None
        self._paths: list[ir.Value] = []
        self._scores: list[ir.Value] = []
        self._margins: list[ir.Value] = []

    def decide(self, router: Router, hidden_states: ir.Value, forced: ir.Value) -> Decision:
        """Return the next hop's decision for every token that has not exited.

        Args:
            router: the hop's router.
            hidden_states: float [T, hidden].
            forced: int64 [T], -1 where the router decides.
        """
        op, asked = self._op, self._alive
        scores = op.Squeeze(router(op, op.Unsqueeze(hidden_states, [0])), [0])
        allowed = self._allowed()
        if self._visited is not None:
            asked = op.And(asked, any_of(op, allowed, 1))
        choices, gated = self._contract.choices(self._layers), self._contract.gate == "probability"
        chosen = choose(op, scores, allowed, forced, choices, gated=gated)
        score = op.Squeeze(op.GatherElements(scores, op.Unsqueeze(chosen.choices, [1]), axis=1), [1])
        goes = op.And(asked, op.Less(chosen.choices, self._layers))
        return Decision(
            asked=asked,
            goes=goes,
            choice=chosen.choices,
            score=score,
            margin=chosen.margins,
            probability=chosen.probabilities,
        )

    def follow(self, decision: Decision, path: ir.Value) -> None:
        """Record a hop.

        Args:
            decision: the hop's decision.
            path: int64 [T], ``decision.path``, or ``TURNED_AWAY`` for a token that found its layer full.
        """
        op = self._op
        self._paths.append(path)
        self._scores.append(op.Where(decision.asked, decision.score, 0.0))
        self._margins.append(op.Where(decision.asked, decision.margin, float("inf")))
        self._alive = decision.goes
        if not self._contract.allow_reuse:
            now = op.Equal(op.Unsqueeze(path, [1]), self._choices)
            self._visited = now if self._visited is None else op.Or(self._visited, now)

    def put_out(self, graph: ir.Graph, position_ids: ir.Value) -> ir.Value:
        """Add the outputs paths int64, path_scores and path_margins float32, all [hops, B, S], to a graph.

        Args:
            graph: the graph.
            position_ids: int64 [B, S], positions of the T = B * S tokens.

        Returns:
            The output paths.
        """
        op, shape = self._op, self._op.Shape(position_ids)
        assert position_ids.shape is not None
        for name, steps in (("paths", self._paths), ("path_scores", self._scores), ("path_margins", self._margins)):
            value = op.Concat(*(op.Unsqueeze(op.Reshape(step, shape), [0]) for step in steps), axis=0)
            dtype = INT64 if name == "paths" else FLOAT
            add_output(graph, value, name, typed_value(name, dtype, [len(steps), *position_ids.shape]))
        return next(output for output in graph.outputs if output.name == "paths")

    def _allowed(self) -> ir.Value:
        """Return the allowed choices of the next hop, bool [T or 1, choices]."""
        op, contract, step = self._op, self._contract, len(self._paths)
        row = np.ones((1, contract.choices(self._layers)), np.bool_)
        if contract.exit and step < contract.min_steps:
            row[:, -1] = False
        allowed = op.initializer(ir.tensor(row), f"allowed_in_step_{step}")
        return allowed if self._visited is None else op.And(allowed, op.Not(self._visited))


def any_of(op: Any, given: ir.Value, axis: int) -> ir.Value:
    """Return whether any value along an axis is true; as numbers, because TensorRT does not reduce booleans."""
    return op.Cast(op.ReduceMax(op.Cast(given, to=INT64), [axis], keepdims=0), to=BOOL)


__all__ = ["Decision", "Paths", "any_of"]
