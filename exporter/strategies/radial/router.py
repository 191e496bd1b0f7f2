"""The router of a Radial Network in the graph: scores and choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.layers import PLAIN, Linear, Norm
from dynexport.exporter.graph.step import FLOAT
from dynexport.exporter.lowering.target import Target, cast


class Router(nn.Module):
    """fc2(silu(fc1(rms_norm(h)))): one score per layer, and one for the exit if the contract has one.

    Args:
        target: the engine that the graph is written for.
        architecture: the model's architecture.
        hidden: width of the inner layer.
        choices: number of scores.
        name: the module's name, where its parent does not set it.
    """

    def __init__(
        self, target: Target, architecture: Architecture, hidden: int, choices: int, name: str | None = None
    ) -> None:
        super().__init__(name)
        self.norm = Norm(target, "rms", architecture.hidden_size, architecture.norm_epsilon)
        self.fc1 = Linear(target, architecture.hidden_size, hidden, bias=True, storage=PLAIN)
        self.fc2 = Linear(target, hidden, choices, bias=True, storage=PLAIN)

    def forward(self, op: Any, hidden_states: ir.Value) -> ir.Value:
        """Return scores float32 [1, N, choices] of float [1, N, hidden], computed in float32."""
        inner = self.fc1(op, self.norm(op, cast(op, hidden_states, FLOAT)))
        return self.fc2(op, op.Mul(inner, op.Sigmoid(inner)))


@dataclass(frozen=True)
class Choices:
    """The choices of N tokens.

    Attributes:
        choices: int64 [N], the forced choice, else the best allowed one, the lowest on ties.
        margins: float32 [N], from the best allowed score to the second, infinity without one.
        probabilities: float32 [N], of the choice among the allowed ones; None without a gate.
    """

    choices: ir.Value
    margins: ir.Value
    probabilities: ir.Value | None


def choose(op: Any, scores: ir.Value, allowed: ir.Value, forced: ir.Value, choices: int, *, gated: bool) -> Choices:
    """Choose for every token; the result is undefined for a token without an allowed choice.

    Args:
        op: writes operators into the graph.
        scores: float32 [N, choices].
        allowed: bool [N or 1, choices].
        forced: int64 [N], -1 where the router decides.
        choices: number of choices.
        gated: true computes probabilities.
    """
    masked = op.Where(allowed, scores, float("-inf"))
    if choices == 1:
        masked = op.Concat(masked, op.Add(masked, float("-inf")), axis=1)
    masked.type, masked.shape = ir.TensorType(FLOAT), ir.Shape([None, max(2, choices)])
    # TopK puts the lower index first on ties.
    two, places = op.TopK(masked, [2], axis=1, sorted=1, _outputs=2)
    best, _ = op.Split(places, axis=1, num_outputs=2, _outputs=2)
    first, second = op.Split(two, axis=1, num_outputs=2, _outputs=2)
    choice = op.Where(op.Less(forced, 0), op.Squeeze(best, [1]), forced)
    margin = op.Squeeze(op.Sub(first, second), [1])
    if not gated:
        return Choices(choice, margin, None)
    chances = op.GatherElements(op.Softmax(masked, axis=1), op.Unsqueeze(choice, [1]), axis=1)
    return Choices(choice, margin, op.Squeeze(chances, [1]))


__all__ = ["Choices", "Router", "choose"]
