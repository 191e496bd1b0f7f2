"""Mixture-of-Depths (arXiv 2404.02258): routed layers run the tokens that their routers choose, and cache only those.

On ONNX Runtime a routed layer is inside an ``If``: it is skipped if no token runs in it; otherwise its matrix products
run on exactly the chosen tokens of all rows. The static form has no condition and no shape that depends on a decision:
every row is padded to a fixed number of tokens. Where attention cannot be inside an ``If``, prompts use the static
form, and decoding has a graph of its own that skips a layer if no row runs in it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.attention import Attention
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.reading import GraphFile, unequal
from dynexport.exporter.graph.writer import LayerWriter
from dynexport.exporter.lowering.plan import SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.alike import check_alike
from dynexport.exporter.strategies.calibration import Calibration, CalibrationOptions
from dynexport.exporter.strategies.mod.caches import filled_chunk, routed_slots
from dynexport.exporter.strategies.mod.calibrate import calibrate
from dynexport.exporter.strategies.mod.constants import route_differences
from dynexport.exporter.strategies.mod.costs import cost_parts
from dynexport.exporter.strategies.mod.describe import describe
from dynexport.exporter.strategies.mod.importers import IMPORTERS
from dynexport.exporter.strategies.mod.oracle import RoutedOracle
from dynexport.exporter.strategies.mod.plan import RoutedPlan
from dynexport.exporter.strategies.mod.routers import attach_routers
from dynexport.exporter.strategies.mod.sources import with_queries_apart
from dynexport.exporter.strategies.mod.supported import check_supported, check_without_conditions
from dynexport.exporter.strategies.mod.writer import RoutedWriter
from dynexport.exporter.strategies.strategy import CostPart, Strategy
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, LayerPart, LayerRouting, Limits, Manifest

_ROUTER = re.compile(r"model\.layers\.([0-9]{1,4})\.mod_router\.weight")


_PARTS: dict[str, tuple[LayerPart, ...]] = {
    "block": ("layer",),
    "attention": ("attention",),
    "mlp": ("mlp",),
    "attention+mlp": ("attention", "mlp"),
}


class ModStrategy(Strategy[Mod, RoutedPlan]):
    """One or two graphs with routes, scores, margins and overflow as outputs."""

    name = "mod"
    summary = "a router per layer chooses the tokens that run in it"
    tensors = r"(model\.)?layers\.\d+\.mod_(router|mlp_router|predictor|adapter)\..+"
    importers = IMPORTERS
    sample = "mod"
    plugin_fields = MappingProxyType({"prefill": "topk"})  # a custom operator computes top-k

    def check_fields(self, fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        if "routed_layers" not in fields:
            raise _no_routed_layers(checkpoint)

    def check(self, contract: Mod, architecture: Architecture, target: Target) -> None:
        check_supported(contract, architecture, target)
        check_alike(self.name, architecture, contract.routed_layers)
        if architecture.sliding_positions is not None:
            raise DynexportError(
                f"mod: expected one set of rotary positions, found {architecture.family}, whose layers with a window "
                "have a set of their own"
            )
        if contract.router_input == "normed" and not architecture.pre_norms:
            raise DynexportError(
                f"router_input: expected hidden, as layers of {architecture.family} have no norm at their input, found "
                "normed"
            )
        if contract.prefill != "topk" or target.top_k_limit is None:
            return
        longest = target.longest_prompt(architecture.max_length)
        chosen = math.ceil(Fraction(str(contract.capacity)) * longest)
        if chosen > target.top_k_limit:
            raise DynexportError(
                f"prefill topk: expected at most {target.top_k_limit} tokens to be chosen from a prompt, "
                f"{target.title}'s TopK takes no more, found {chosen} = {contract.capacity:g} * {longest}; build with "
                "our plugins (--plugins), lower --max-prompt, or decide causally (--set prefill=causal)"
            )

    def architecture(self, contract: Mod, architecture: Architecture) -> Architecture:
        return architecture if contract.skipped_kv == "none" else with_queries_apart(architecture, contract)

    def without_int8_caches(self, contract: Mod) -> str:
        return "" if contract.skipped_kv == "none" else "tokens that skip attention append their entries without it"

    def norm_epsilons(self, contract: Mod) -> Mapping[str, float]:
        own = contract.router.epsilon
        return {} if own is None else {r"(.+\.)?mod_(mlp_)?router\.norm\.weight": own}

    def cost_parts(self, contract: Mod) -> tuple[CostPart, ...]:
        return cost_parts(contract)

    def depths(self, contract: Mod, layers: int) -> tuple[Depth, ...]:
        if contract.routed_layers[-1] >= layers:
            raise DynexportError(f"routed_layers: expected layers 0..{layers - 1}, found {contract.routed_layers[-1]}")
        return ()

    def unused(self, contract: Mod) -> dict[str, str]:
        if contract.decision.rule == "predictor":
            return {}
        routed = "|".join(map(str, contract.routed_layers))
        return {rf"(model\.)?layers\.({routed})\.mod_predictor\..+": f"decision.rule is {contract.decision.rule}"}

    def graphs(
        self, contract: Mod, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[RoutedPlan, ...]:
        everything = tuple(range(layers))
        if static:
            check_without_conditions(contract, "--static")
        unrouted = tuple(
            layer for layer in everything if contract.all_have_entries or layer not in contract.routed_layers
        )
        model = RoutedPlan(
            "model",
            everything,
            contiguous=unrouted,
            padded=static or not target.conditional_layers,
            whole_prompts=contract.whole_prompts,
        )
        if target.conditional_layers or static:
            return (model,)
        # A decode profile in the prompt graph would nearly double its engine's build time.
        prompts = replace(model, serves=("prefill",))
        return (prompts, RoutedPlan("decode", everything, contiguous=unrouted, serves=("decode",)))

    def slots(self, contract: Mod, place: int, max_length: int, plans: tuple[RoutedPlan, ...]) -> SlotRule:
        if place not in contract.routed_layers or contract.all_have_entries:
            return SlotRule()
        return routed_slots(contract, max_length, padded=plans[0].padded)

    def routing(self, contract: Mod, plans: tuple[RoutedPlan, ...]) -> LayerRouting:
        return LayerRouting(
            layers=contract.routed_layers,
            parts=_PARTS[contract.target],
            skipped_kv="kept" if contract.all_have_entries else "none",
            overflow=contract.cache.overflow,
        )

    def limits(self, contract: Mod, max_length: int, plans: tuple[RoutedPlan, ...]) -> Limits:
        chunk = filled_chunk(contract, max_length, padded=plans[0].padded)
        return Limits(filled=chunk, whole_prompts=contract.whole_prompts)

    def attach(self, model: CausalLM, contract: Mod, checkpoint: Checkpoint, target: Target) -> None:
        for layer in model.model.layers:
            if layer.index not in contract.routed_layers:
                continue
            if contract.skipped_kv == "own":
                layer.self_attn = Attention(target, model.architecture, layer.index, apart=True)
            attach_routers(layer, contract, checkpoint, target)

    def writer(self, plan: RoutedPlan, architecture: Architecture, target: Target, contract: Mod) -> LayerWriter:
        return RoutedWriter(plan, architecture, target, contract)

    def manifest_differences(self, manifest: Manifest) -> Iterator[str]:
        assert isinstance(manifest.contract, Mod)
        slots: int | None = manifest.contract.slots(manifest.model.max_length)
        routed = manifest.contract.routed_layers
        if manifest.contract.all_have_entries:
            slots = None
        found = {cache.most for cache in manifest.caches if cache.place in routed}
        yield from unequal("manifest: entries of routed caches", {slots}, found)
        layers = manifest.routing.layers if isinstance(manifest.routing, LayerRouting) else ()
        yield from unequal("manifest: routed layers", routed, layers)

    def graph_differences(self, graph: GraphFile, manifest: Manifest) -> Iterator[str]:
        assert isinstance(manifest.contract, Mod)
        return route_differences(graph, manifest, manifest.contract)

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, Mod)
        return RoutedOracle(weights, manifest.contract, manifest.model.max_length)

    def describe(self, manifest: Manifest) -> list[tuple[str, str]]:
        assert isinstance(manifest.contract, Mod)
        return describe(manifest.contract)

    def calibrate(self, bundle: Bundle, ids: Sequence[int], options: CalibrationOptions) -> Calibration:
        return calibrate(bundle, ids, options)


def _no_routed_layers(checkpoint: Checkpoint) -> DynexportError:
    """Return the error for a contract without ``routed_layers``, with advice from the checkpoint's routers."""
    found = sorted(int(match[1]) for name in checkpoint.names if (match := _ROUTER.fullmatch(name)))
    if found:
        advice = f"the checkpoint has routers in layers {found}: --set 'routed_layers={found}'"
    else:
        advice = (
            "the checkpoint has no tensor model.layers.{i}.mod_router.weight either: add routers, or name the "
            "code that wrote it with --import"
        )
    return DynexportError(
        f"{checkpoint.source}: contract: routed_layers: expected the layers with a router, in config.json or with "
        f"--set 'routed_layers=[1,3]', found none; {advice}"
    )


STRATEGY = ModStrategy()
