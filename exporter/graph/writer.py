"""Write the layers of a whole step into its graph; a strategy's subclass adds the routing."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import run_if
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.step import LayerCache, Step, StepInputs
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target


class LayerWriter:
    """Writes the layers of one graph; in this base class, every layer runs all tokens.

    ``build_graph`` calls ``begin`` once, ``slots`` and ``run_layer`` for every layer, and ``finish`` once.
    """

    def __init__(self, plan: GraphPlan, architecture: Architecture, target: Target) -> None:
        self.plan, self.architecture, self.target = plan, architecture, target

    def begin(self, op: Any, graph: ir.Graph, inputs: StepInputs) -> None:
        """Add the strategy's inputs, and compute the values that all layers share."""

    def slots(self, layer: int) -> int | str:
        """Return the number of slots of the layer's cache: a number if the target fixes it, else a symbol."""
        return self.architecture.max_length if self.target.fixed_slots else "M"

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write one layer and return the hidden states [B, S, hidden] and the cache after it."""
        return self.write(op, layer, hidden_states, step, cache)

    def write(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write what a layer that runs all tokens consists of, in the graph or in a branch."""
        return layer(op, hidden_states, step.for_layer(op, layer.index), cache)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        """Add the strategy's outputs, and check the finished graph.

        Raises:
            BrokenGraph: if a check of the finished graph fails.
        """


class ConditionalWriter(LayerWriter):
    """Writes each layer, including its cache append, inside an ``If`` on its element of ``layer_active``.

    Contiguous layers run at every depth and have no ``If``; a graph without conditions runs all its layers.
    """

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if not self.plan.conditional or layer.index in self.plan.contiguous or layer.is_empty:
            return super().run_layer(op, layer, hidden_states, step, cache)

        def run(op: Any) -> tuple[ir.Value, LayerCache]:
            return self.write(op, layer, hidden_states, step, cache)

        active = op.Gather(step.inputs.layer_active, step.row_of(layer.index))
        return run_if(op, active, run, hidden_states, cache, f"layer_{layer.index}")


__all__ = ["ConditionalWriter", "LayerWriter"]
