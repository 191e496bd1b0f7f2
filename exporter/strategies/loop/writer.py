"""Write the layers of a looped model: a norm before every later loop, and conditions around these loops' layers."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.layers import Norm
from dynexport.exporter.graph.step import LayerCache, Step
from dynexport.exporter.graph.writer import ConditionalWriter
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.loop.order import Order


class LoopWriter(ConditionalWriter):
    """Writes the runs of layers; ``norm`` is applied before every loop but the first, None for no norm there.

    A loop's last hidden states stay as they are, so that a depth of fewer loops ends with the final norm alone.
    """

    def __init__(
        self, plan: GraphPlan, architecture: Architecture, target: Target, order: Order, norm: Norm | None
    ) -> None:
        super().__init__(plan, architecture, target)
        self._norm = norm
        self._first_of_later_loops = {order.loop(number)[0] for number in range(1, order.loops)}

    def write(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if self._norm is not None and layer.index in self._first_of_later_loops:
            hidden_states = self._norm(op, hidden_states)
        return super().write(op, layer, hidden_states, step, cache)


__all__ = ["LoopWriter"]
