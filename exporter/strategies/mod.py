"""Mixture-of-Depths (arXiv 2404.02258): routed layers run the tokens that their routers choose, and cache only those.

On ONNX Runtime a routed layer stands inside an ``If``: a layer that no token chose is skipped, and otherwise exactly
the chosen tokens of all rows go through its products. The static form has neither a condition nor a shape that depends
on a choice: every row has room for so many tokens, padded. Where attention cannot stand in an ``If``, prompts take the
static form, and decoding a graph of its own, in which a layer that no row chose is skipped.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.graph import routing
from dynexport.exporter.graph.branch import run_if
from dynexport.exporter.graph.decoder import CausalLM, DecoderLayer
from dynexport.exporter.graph.layers import PLAIN, Linear
from dynexport.exporter.graph.routed_caches import routed_caches
from dynexport.exporter.graph.step import LayerCache, Step
from dynexport.exporter.lowering.plan import GraphPlan, SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Oracle, RoutedOracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import AnyContract, Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, LayerRouting, Limits, Manifest


class ModStrategy(Strategy):
    """One graph for prompts and decoding; routes, scores, margins and overflow are outputs."""

    name = "mod"
    summary = "a router per layer chooses the tokens that run in it"
    tensors = r"(model\.)?layers\.\d+\.mod_(router|predictor)\..+"

    def speedups(self, contract: AnyContract, layers: int) -> tuple[Depth, ...]:
        assert isinstance(contract, Mod)
        if contract.routed_layers[-1] >= layers:
            raise DynexportError(f"routed_layers: expected layers 0..{layers - 1}, found {contract.routed_layers[-1]}")
        return ()

    def unused(self, contract: AnyContract) -> dict[str, str]:
        assert isinstance(contract, Mod)
        if contract.decision.rule == "predictor":
            return {}
        routed = "|".join(map(str, contract.routed_layers))
        return {rf"(model\.)?layers\.({routed})\.mod_predictor\..+": f"decision.rule is {contract.decision.rule}"}

    def graphs(
        self, contract: AnyContract, speedups: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        assert isinstance(contract, Mod)
        everything = tuple(range(layers))
        unrouted = tuple(layer for layer in everything if layer not in contract.routed_layers)
        padded = static or not target.conditional_layers
        model = GraphPlan("model", everything, contiguous=unrouted, padded=padded)
        if target.conditional_layers or static:
            return (model,)
        # A profile for decoding would nearly double the time that the first takes to build.
        prompts = replace(model, serves=("prefill",))
        return (prompts, GraphPlan("decode", everything, contiguous=unrouted, serves=("decode",)))

    def slots(self, contract: AnyContract, place: int, max_length: int, plans: tuple[GraphPlan, ...]) -> SlotRule:
        routed = routed_caches(contract, max_length, padded=plans[0].padded)
        if routed is None or place not in routed.layers:
            return SlotRule()
        return SlotRule(most=routed.slots, slack=routed.slack)

    def routing(self, contract: AnyContract, plans: tuple[GraphPlan, ...]) -> LayerRouting:
        assert isinstance(contract, Mod)
        return LayerRouting(layers=contract.routed_layers, overflow=contract.cache.overflow)

    def limits(self, contract: AnyContract, max_length: int, plans: tuple[GraphPlan, ...]) -> Limits:
        assert isinstance(contract, Mod)
        routed = routed_caches(contract, max_length, padded=plans[0].padded)
        return Limits(filled=routed.chunk if routed else None, whole_prompts=contract.prefill == "topk")

    def attach(self, model: CausalLM, contract: AnyContract, checkpoint: Checkpoint, target: Target) -> None:
        assert isinstance(contract, Mod)
        hidden = model.architecture.hidden_size
        for layer in model.model.layers:
            if layer.index not in contract.routed_layers:
                continue
            name = f"model.layers.{layer.index}.mod_"
            bias = f"{name}router.bias" in checkpoint.names
            layer.mod_router = Linear(target, hidden, 1, bias=bias, storage=PLAIN)
            if contract.decision.rule == "predictor":
                layer.mod_predictor = routing.Predictor(
                    target, hidden, _width(checkpoint, f"{name}predictor.fc1.weight")
                )

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, Mod)
        return RoutedOracle(weights, manifest.contract, manifest.model.max_length)

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        if step.routing is None or layer.index not in step.routing.contract.routed_layers:
            return super().run_layer(op, layer, hidden_states, step, cache)
        shared = step.routing
        contract = shared.contract
        x = layer.input_layernorm(op, hidden_states) if contract.router_input == "normed" else hidden_states
        score = layer.mod_router(op, x)
        logit = layer.mod_predictor(op, x) if contract.decision.rule == "predictor" else score
        route = routing.decide(op, layer.index, score, logit, shared)

        def run(op: Any, compacted: routing.Compacted) -> tuple[ir.Value, LayerCache]:
            output, present = layer(op, compacted.hidden_states, compacted.step, cache)
            return routing.combined(op, contract, compacted, output), present

        if shared.padded:
            return run(op, routing.Padded(op, layer.index, route, hidden_states, step, shared))
        if not shared.target.conditional_layers:
            rows = routing.EveryRow(op, layer.index, route, hidden_states, step, shared)
            nothing = rows.no_entries(op, cache)
            name = f"layer_{layer.index}"
            output, entries = run_if(op, rows.any(op), lambda op: run(op, rows), hidden_states, nothing, name)
            return output, rows.append(op, cache, entries)
        anybody = op.ReduceMax(route.chosen, keepdims=0)
        return run_if(
            op,
            anybody,
            lambda op: run(op, routing.Ragged(op, layer.index, route, hidden_states, step, shared)),
            hidden_states,
            cache,
            f"layer_{layer.index}",
        )


def _width(checkpoint: Checkpoint, name: str) -> int:
    """P of a predictor's first weight [P, hidden]; where it is misshapen, reading it will say so."""
    return (*checkpoint.shape(name), 1)[0]


STRATEGY = ModStrategy()
