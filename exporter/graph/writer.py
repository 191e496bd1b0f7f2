"""How the layers of a whole step are written into its graph; a strategy's own writer adds what its routing needs."""

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
    """Writes the layers of one graph; here, every layer runs all tokens, and nothing is added to the graph.

    ``build_graph`` calls ``begin`` once, ``slots`` and ``run_layer`` for every layer, and ``finish`` once.
    """

    def __init__(self, plan: GraphPlan, architecture: Architecture, target: Target) -> None:
        self.plan, self.architecture, self.target = plan, architecture, target

    def begin(self, op: Any, graph: ir.Graph, inputs: StepInputs) -> None:
        """Add further inputs, and compute what all layers share."""

    def slots(self, layer: int) -> int | str:
        """How many slots the layer's cache has: a symbol, or the number where that stands in the graph."""
        return self.architecture.max_length if self.target.fixed_slots else "M"

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write one layer: hidden_states [B, S, hidden] -> (the same after the layer, the cache after the layer)."""
        return layer(op, hidden_states, step.for_layer(op, layer.index), cache)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        """Add further outputs, and look at the finished graph.

        Raises:
            BrokenGraph: for a graph that must not be so.
        """


class ConditionalWriter(LayerWriter):
    """Writes every layer, its cache append included, under the condition that ``layer_active`` says so.

    Contiguous layers are those that no depth skips: they stand there without.
    """

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if layer.index in self.plan.contiguous:
            return super().run_layer(op, layer, hidden_states, step, cache)

        def run(op: Any) -> tuple[ir.Value, LayerCache]:
            return layer(op, hidden_states, step.for_layer(op, layer.index), cache)

        active = op.Gather(step.inputs.layer_active, step.row_of(layer.index))
        return run_if(op, active, run, hidden_states, cache, f"layer_{layer.index}")


__all__ = ["ConditionalWriter", "LayerWriter"]
