"""The exit rules of looped models: what each measures after a loop, and which tokens go on for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.layers import Linear, Norm
from dynexport.exporter.graph.step import FLOAT
from dynexport.exporter.lowering.target import cast


@dataclass
class Hazard:
    """After every loop a gate gives the probability to exit there; a token exits once their sum reaches the threshold.

    Attributes:
        gate: the gate, hidden -> 1.
        norm: the final norm, whose output the gate reads.
        threshold: the threshold of the sum.
        normed: [B, S, hidden], the state of every token after its last loop and the final norm.
    """

    gate: Linear
    norm: Norm
    threshold: float
    normed: ir.Value | None = field(default=None, init=False)
    _total: ir.Value | None = field(default=None, init=False)
    _passed: ir.Value = field(init=False)

    def begin(self, op: Any, state: ir.Value | None) -> None:
        """Take the state before the first loop, on which nothing depends."""

    def score(self, op: Any, state: ir.Value, live: ir.Value) -> ir.Value:
        """Return the sum of probabilities, float32 [B, S, 1].

        Args:
            state: [B, S, hidden], the state of every token after its last loop.
            live: bool [B, S, 1], the tokens that ran this loop; the sum of the others stays.
        """
        self.normed = self.norm(op, state)
        share = op.Sigmoid(cast(op, self.gate(op, self.normed), FLOAT))
        if self._total is None:
            self._total, self._passed = share, op.Sub(1.0, share)
        else:
            self._total = op.Where(live, op.Add(self._total, op.Mul(share, self._passed)), self._total)
            self._passed = op.Mul(self._passed, op.Sub(1.0, share))
        return self._total

    def goes_on(self, op: Any, score: ir.Value) -> ir.Value:
        """Return which tokens go on, bool [B, S, 1]."""
        return op.Less(score, self.threshold)


@dataclass
class Change:
    """A token exits after the first loop that changes its state by less than the threshold, relative to the state.

    Attributes:
        threshold: the threshold.
        normed: None, as the rule needs no norm.
    """

    threshold: float
    normed: ir.Value | None = field(default=None, init=False)
    _before: ir.Value | None = field(default=None, init=False)
    _score: ir.Value | None = field(default=None, init=False)

    def begin(self, op: Any, state: ir.Value | None) -> None:
        """Take the state before the first loop, [B or 1, S or 1, hidden]; None for zeros."""
        self._before = None if state is None else cast(op, state, FLOAT)

    def score(self, op: Any, state: ir.Value, live: ir.Value) -> ir.Value:
        """Return the relative change, float32 [B, S, 1]; arguments as for ``Hazard.score``."""
        now = cast(op, state, FLOAT)
        moved = now if self._before is None else op.Sub(now, self._before)
        score = op.Div(op.ReduceL2(moved, [-1]), op.ReduceL2(now, [-1]))
        self._before = now
        self._score = score if self._score is None else op.Where(live, score, self._score)
        return self._score

    def goes_on(self, op: Any, score: ir.Value) -> ir.Value:
        """Return which tokens go on, bool [B, S, 1]."""
        return op.GreaterOrEqual(score, self.threshold)


Rule = Hazard | Change

__all__ = ["Change", "Hazard", "Rule"]
