"""Exits of looped models in a graph: which tokens go on to the next loop, and the state that each leaves with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.step import BOOL, FLOAT, INT64
from dynexport.exporter.graph.values import add_input, add_output, typed_value
from dynexport.exporter.strategies.loop.rules import Rule


@dataclass
class Exits:
    """An exit rule in a graph, from loop to loop.

    Additional inputs: ``token_counts`` int64 [B], and ``forced_routes`` int64 [T - 1, B, S]: whether a token goes on to
    loop 1, 2, ..; 1 go on, 0 exit, -1 the rule decides. Additional outputs: ``routes`` bool, ``route_scores`` and
    ``route_margins`` float32 [T - 1, B, S], ``overflow`` int64 [T - 1, B], which is 0.

    Attributes:
        rule: the rule.
        loops: T, most loops.
        live: bool [B, S, 1], the tokens that have not exited.
        hidden_states: [B, S, hidden], the state of every token after its last loop.
    """

    rule: Rule
    loops: int
    live: ir.Value = field(init=False)
    hidden_states: ir.Value | None = field(default=None, init=False)
    _forced: list[ir.Value] = field(init=False)
    _counts: ir.Value = field(init=False)
    _scores: list[ir.Value] = field(default_factory=list, init=False)
    _lives: list[ir.Value] = field(default_factory=list, init=False)

    def begin(self, op: Any, graph: ir.Graph) -> None:
        """Add the inputs; every real token is in the first loop."""
        self._counts = add_input(graph, "token_counts", INT64, ["B"])
        forced = add_input(graph, "forced_routes", INT64, [self.loops - 1, "B", "S"])
        self._forced = [op.Unsqueeze(op.Gather(forced, number), [2]) for number in range(self.loops - 1)]
        places = op.Range(0, op.Squeeze(op.Shape(forced, start=2, end=3), [0]), 1)
        self.live = op.Less(op.Unsqueeze(places, [0, 2]), op.Unsqueeze(self._counts, [1, 2]))

    def after_loop(self, op: Any, number: int, hidden_states: ir.Value) -> None:
        """Take the hidden states of a loop for the tokens that ran it, and decide which go on to the next."""
        kept = hidden_states
        if self.hidden_states is not None:
            kept = op.Where(self.live, hidden_states, self.hidden_states)
        self.hidden_states = kept
        if number == self.loops - 1:
            return
        score = self.rule.score(op, kept, self.live)
        forced = self._forced[number]
        goes_on = op.And(self.rule.goes_on(op, score), op.Not(op.Equal(forced, 0)))
        self.live = op.And(self.live, op.Or(goes_on, op.Greater(forced, 0)))
        self._scores.append(score)
        self._lives.append(self.live)

    def anybody(self, op: Any) -> ir.Value:
        """Return bool scalar, whether a token runs the next loop."""
        return op.ReduceMax(self.live, keepdims=0)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        """Add the outputs."""
        scores, lives = (
            op.Transpose(op.Concat(*parts, axis=2), perm=[2, 0, 1]) for parts in (self._scores, self._lives)
        )
        nothing = op.Expand(op.Mul(self._counts, 0), op.Concat([self.loops - 1], op.Shape(self._counts), axis=0))
        for name, value, dtype in (
            ("routes", lives, BOOL),
            ("route_scores", scores, FLOAT),
            ("route_margins", op.Abs(op.Sub(scores, self.rule.threshold)), FLOAT),
        ):
            add_output(graph, value, name, typed_value(name, dtype, [self.loops - 1, "B", "S"]))
        add_output(graph, nothing, "overflow", typed_value("overflow", INT64, [self.loops - 1, "B"]))


__all__ = ["Exits"]
