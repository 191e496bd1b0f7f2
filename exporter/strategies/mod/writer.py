"""Write a routed layer into a graph: under a condition, padded, or for one token of every row."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.branch import run_if
from dynexport.exporter.graph.decoder import DecoderLayer
from dynexport.exporter.graph.step import BOOL, FLOAT, INT64, LayerCache, Step, StepInputs
from dynexport.exporter.graph.values import add_output, typed_value
from dynexport.exporter.graph.writer import LayerWriter
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.mod.caches import routed_slots
from dynexport.exporter.strategies.mod.checks import check_routed_graph
from dynexport.exporter.strategies.mod.compaction import Compacted, EveryRow, Padded, Ragged, combined
from dynexport.exporter.strategies.mod.plan import RoutedPlan
from dynexport.exporter.strategies.mod.routing import Route, RoutedInputs, Routing, decide, decide_at_once, outputs
from dynexport.runtime.bundle.contract import Mod


class RoutedWriter(LayerWriter):
    """Writes the layers of a routed graph, whose routed layers run the tokens that their routers choose.

    Additional inputs: ``token_counts`` int64 [B], ``forced_routes`` int64 [R, B, S], and ``is_prompt`` bool where
    prompts choose by top-k. Additional outputs: ``routes`` bool, ``route_scores`` and ``route_margins`` float32
    [R, B, S], ``overflow`` int64 [R, B]. R is the number of routed layers.
    """

    plan: RoutedPlan

    def __init__(self, plan: RoutedPlan, architecture: Architecture, target: Target, contract: Mod) -> None:
        super().__init__(plan, architecture, target)
        self._contract = contract

    def begin(self, op: Any, graph: ir.Graph, inputs: StepInputs) -> None:
        told = RoutedInputs.add(graph, self._contract, self.plan)
        self._routing = Routing.prepare(
            op, self.architecture, self._contract, self.plan, self.target, step=inputs, told=told
        )

    def slots(self, layer: int) -> int | str:
        if layer not in self._contract.routed_layers:
            return super().slots(layer)
        if not self.target.fixed_slots:
            return "M_routed"
        rule = routed_slots(self._contract, self.architecture.max_length, padded=True)
        return (rule.most or 0) + rule.slack

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if layer.index not in self._contract.routed_layers:
            return super().run_layer(op, layer, hidden_states, step, cache)
        routing = self._routing
        route = self._decide(op, layer, hidden_states)
        name = f"layer_{layer.index}"

        def run(op: Any, compacted: Compacted) -> tuple[ir.Value, LayerCache]:
            output, present = layer(op, compacted.hidden_states, compacted.step, cache)
            return combined(op, self._contract, compacted, output), present

        if self.plan.padded:
            return run(op, Padded(op, layer.index, route, hidden_states, step, routing))
        if not self.target.conditional_layers:
            rows = EveryRow(op, layer.index, route, hidden_states, step, routing)
            nothing = rows.no_entries(op, cache)
            output, entries = run_if(op, rows.any(op), lambda op: run(op, rows), hidden_states, nothing, name)
            return output, rows.append(op, cache, entries)
        anybody = op.ReduceMax(route.chosen, keepdims=0) if route.anybody is None else route.anybody
        return run_if(
            op,
            anybody,
            lambda op: run(op, Ragged(op, layer.index, route, hidden_states, step, routing)),
            hidden_states,
            cache,
            name,
        )

    def _decide(self, op: Any, layer: DecoderLayer, hidden_states: ir.Value) -> Route:
        contract = self._contract
        x = layer.input_layernorm(op, hidden_states) if contract.router_input == "normed" else hidden_states
        if self._routing.at_once:
            return decide_at_once(op, layer.index, x, layer.mod_router, self._routing)
        score = layer.mod_router(op, x)
        logit = layer.mod_predictor(op, x) if contract.decision.rule == "predictor" else score
        return decide(op, layer.index, score, logit, self._routing)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        routing = self._routing
        for name, value in outputs(op, routing).items():
            shape: list[int | str] = [len(routing.routes), "B", "S"]
            dtype = {"routes": BOOL, "overflow": INT64}.get(name, FLOAT)
            add_output(graph, value, name, typed_value(name, dtype, shape[:2] if name == "overflow" else shape))
        check_routed_graph(graph, self.architecture, routing)


__all__ = ["RoutedWriter"]
