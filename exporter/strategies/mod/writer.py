"""Write a routed layer into a graph: under a condition, padded, or for one token of every row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
from dynexport.exporter.strategies.mod.gates import mlp_gate
from dynexport.exporter.strategies.mod.parts import Parts, anybody
from dynexport.exporter.strategies.mod.plan import RoutedPlan
from dynexport.exporter.strategies.mod.routers import ROUTERS
from dynexport.exporter.strategies.mod.routing import Route, RoutedInputs, Routing, decide, decide_at_once, outputs
from dynexport.exporter.strategies.mod.sequences import mean_of_prompt, of_every_token
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
        if layer not in self._contract.routed_layers or self._contract.all_have_entries:
            return super().slots(layer)
        if not self.target.fixed_slots:
            return "M_routed"
        rule = routed_slots(self._contract, self.architecture.max_length, padded=True)
        return (rule.most or 0) + rule.slack

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        contract = self._contract
        if layer.index not in contract.routed_layers:
            return super().run_layer(op, layer, hidden_states, step, cache)
        names = ROUTERS[: contract.decisions_per_layer]
        routes = [self._decide(op, layer, name, hidden_states, step) for name in names]
        parts = Parts(layer, self._routing, f"layer_{layer.index}")
        if contract.target == "mlp":
            output, present = self._attended(op, layer, hidden_states, step, cache)
        elif contract.skipped_kv == "own":
            write = parts.block if contract.target == "block" else parts.attention
            output, present = write(op, hidden_states, step.for_layer(op, layer.index), cache, routes[0])
        else:
            output, present = self._without_entries(op, parts, hidden_states, step, cache, routes[0])
        if contract.target == "attention":
            output = op.Add(output, layer.mlp_of(op, output))
        elif contract.target != "block":
            output = parts.mlp(op, output, routes[-1])
        if contract.skip_branch == "adapter":
            output = parts.adapter(op, output, routes[-1])
        return output, present

    def _attended(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write attention and its residual for every token."""
        with _named(op, layer):
            told = step.for_layer(op, layer.index)
            attention, present = layer.self_attn(op, layer.before_attention(op, hidden_states), told, cache)
            return op.Add(hidden_states, attention), present

    def _without_entries(
        self, op: Any, parts: Parts, hidden_states: ir.Value, step: Step, cache: LayerCache, route: Route
    ) -> tuple[ir.Value, LayerCache]:
        """Write a block, or its attention, for the tokens that run in it; the others leave no entry."""
        layer, routing, name = parts.layer, self._routing, parts.name

        def run(op: Any, compacted: Compacted) -> tuple[ir.Value, LayerCache]:
            hidden = compacted.hidden_states
            normed = layer.before_attention(op, hidden)
            attention, present = layer.self_attn(op, normed, compacted.step, cache)
            if self._contract.target == "block":
                gate = mlp_gate(op, self._contract, compacted.strength(op))
                output = layer.after_attention(op, hidden, attention, gate=gate)
            else:
                output = op.Add(hidden, attention)
            return combined(op, self._contract, compacted, output), present

        if self.plan.padded:
            with _named(op, layer):
                return run(op, Padded(op, layer.index, route, hidden_states, step, routing))
        if not self.target.conditional_layers:
            rows = EveryRow(op, layer.index, route, hidden_states, step, routing)
            nothing = rows.no_entries(op, cache)
            output, entries = run_if(op, rows.any(op), lambda op: run(op, rows), hidden_states, nothing, name)
            return output, rows.append(op, cache, entries)
        with_mlp = self._contract.target == "block"
        return run_if(
            op,
            anybody(op, route),
            lambda op: run(op, Ragged(op, layer.index, route, hidden_states, step, routing)),
            hidden_states,
            cache,
            name,
            skip=(lambda op: parts.skipped(op, hidden_states, route)) if with_mlp else None,
        )

    def _decide(self, op: Any, layer: DecoderLayer, name: str, hidden_states: ir.Value, step: Step) -> Route:
        contract, routing, router = self._contract, self._routing, getattr(layer, name)
        x = layer.input_layernorm(op, hidden_states) if contract.router_input == "normed" else hidden_states
        if routing.at_once:
            return decide_at_once(op, x, router, routing)
        if contract.level == "sequence":
            score = router(op, mean_of_prompt(op, x, routing))
            length = op.Gather(step.inputs.cache_lengths, step.row_of(layer.index))
            return decide(op, *of_every_token(op, score, step.inputs.position_ids, length, routing), routing)
        score = router(op, x)
        logit = layer.mod_predictor(op, x) if contract.decision.rule == "predictor" else score
        return decide(op, score, logit, routing)

    def finish(self, op: Any, graph: ir.Graph) -> None:
        routing = self._routing
        for name, value in outputs(op, routing).items():
            shape: list[int | str] = [len(routing.routes), "B", "S"]
            dtype = {"routes": BOOL, "overflow": INT64}.get(name, FLOAT)
            add_output(graph, value, name, typed_value(name, dtype, shape[:2] if name == "overflow" else shape))
        check_routed_graph(graph, self.architecture, routing)


@contextmanager
def _named(op: Any, layer: DecoderLayer) -> Iterator[None]:
    """Begin the names of nodes with the layer's; those inside a condition begin with the condition's."""
    op.builder.push_module(f"layer_{layer.index}")
    try:
        yield
    finally:
        op.builder.pop_module()


__all__ = ["RoutedWriter"]
