"""What happens to hidden states at the ends of a looped model's body: norms, and the injection of the body's input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.graph.layers import Linear, Norm
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.loop.order import Order
from dynexport.runtime.bundle.contract import Loop


@dataclass
class Adapter:
    """The projection of a state s and of the body's input e together, as W [s; e] = W_s s + W_e e.

    W_e e is the same in every loop, so a step reads that half of W once.

    Attributes:
        state: W_s, hidden -> hidden.
        input: W_e, likewise.
        start: float32 [hidden], s before the first loop; None: zeros, with which W_s has nothing to multiply.
    """

    state: Linear
    input: Linear
    start: np.ndarray | None
    _injected: ir.Value = field(init=False)

    def first(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """Return what the first loop begins with, from the body's input; both [B, S, hidden]."""
        self._injected = self.input(op, hidden_states)
        start = self.start_value(op)
        return self._injected if start is None else op.Add(self.state(op, start), self._injected)

    def later(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """Return what a later loop begins with, from the state after the one before."""
        return op.Add(self.state(op, hidden_states), self._injected)

    def start_value(self, op: Any) -> ir.Value | None:
        """Return the state before the first loop, [1, 1, hidden]; None for zeros."""
        if self.start is None:
            return None
        return cast(op, op.Constant(value=ir.tensor(self.start[None, None])), self.state.target.activations)


@dataclass(frozen=True)
class Between:
    """What a token's hidden states become before a run of a layer.

    Attributes:
        contract: the strategy's contract.
        order: the order of runs.
        norm: the final norm.
        adapter: the adapter; None without one.
    """

    contract: Loop
    order: Order
    norm: Norm
    adapter: Adapter | None

    def loop_from(self, run: int) -> int | None:
        """Return the loop that begins with a run, or None."""
        number, place = divmod(run - self.order.before, self.order.body)
        return number if place == 0 and 0 <= number < self.order.loops else None

    def enter(self, op: Any, run: int, hidden_states: ir.Value, normed: ir.Value | None = None) -> ir.Value:
        """Return the input of a run's layer, [B, S, hidden]; ``normed`` is the final norm's output, if it is there."""
        loop = self.loop_from(run)
        if loop == 0 and self.adapter is not None:
            return self.adapter.first(op, hidden_states)
        norms = self.contract.norm_between if loop else self.contract.norm_after and self.is_after(run)
        if norms:
            hidden_states = self.norm(op, hidden_states) if normed is None else normed
        return self.adapter.later(op, hidden_states) if loop and self.adapter is not None else hidden_states

    def is_after(self, run: int) -> bool:
        """Return whether a run is the first behind the body."""
        return run == self.order.before + self.order.loops * self.order.body


__all__ = ["Adapter", "Between"]
