"""Radial Networks (arXiv 2404.04900): a router chooses every token's next layer of a pool, or the exit.

On ONNX Runtime a bundle is a set of small graphs that the runtime calls hop by hop: only the chosen layer's weights are
read, every weight is stored once, and caches are updated in place (docs/architecture.md, "Paths through a pool"). For
engines that need one graph there is one, in which every layer runs in every hop. With dynexport's custom operators a
decode graph is added to the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import WriteGraph, build_part
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.reading import GraphFile, unequal
from dynexport.exporter.lowering.plan import PADDED_CHUNK, Dimension, SlotRule
from dynexport.exporter.lowering.plugged_onnxruntime import PluggedOnnxRuntime
from dynexport.exporter.lowering.selected_onnxruntime import SelectedOnnxRuntime
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.lowering.tensorrt.selected import SelectedLayer
from dynexport.exporter.reference import Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.alike import check_alike
from dynexport.exporter.strategies.radial import parts
from dynexport.exporter.strategies.radial.constants import path_differences
from dynexport.exporter.strategies.radial.decode import decode_graph
from dynexport.exporter.strategies.radial.oracle import RadialOracle
from dynexport.exporter.strategies.radial.plan import PathPlan, Role
from dynexport.exporter.strategies.radial.pool import pool_graph, pool_parts
from dynexport.exporter.strategies.radial.router import Router
from dynexport.exporter.strategies.radial.selected_decode import selected_decode_graph
from dynexport.exporter.strategies.radial.single import single_graph
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, GraphSet, Limits, Manifest, PathRouting, Program

_LINE: Mapping[str, Dimension] = {"N": "line"}


# The layers whose modules a graph is written with, where they differ from the plan's: attention has no weights, so it
# uses the module of layer 0.
_MODULES: dict[str, tuple[int, ...]] = {"decode": (), "attention": (0,)}


class RadialStrategy(Strategy[Radial, PathPlan]):
    """A set of graphs, in which the router's choice is a graph output; or a single graph."""

    name = "radial"
    summary = "a router chooses every token's next layer"
    tensors = r"(model\.)?radial_router\..+"
    sample = "radial-distilled"
    plugin_fields = MappingProxyType({})  # a custom operator selects the weights of chosen layers in a decode step

    def without_int8_caches(self, contract: Radial) -> str:
        return "whose graphs use one attention for the caches of all hops"

    def depths(self, contract: Radial, layers: int) -> tuple[Depth, ...]:
        return ()

    def graphs(
        self, contract: Radial, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[PathPlan, ...]:
        if static:
            raise DynexportError(
                "--static: expected with --strategy unified-skip or mod, found radial; for a static graph of radial "
                "give --single-graph"
            )
        if target.plugins:
            _check_selection(contract, target)
        selects = target.selects_weights and contract.cache_policy == "step"
        pool = range(layers)
        steps = [None] if contract.router.shared else range(contract.max_steps)
        decode = PathPlan("decode", tuple(pool), role="decode", serves=("decode",), dimensions={"B": "rows"})
        return (
            # The decode graph comes first: it stacks the weights, and the set's weights are parts of its tensors.
            *([decode] if selects else []),
            PathPlan("embedding", (), role="embedding", dimensions=_LINE),
            *(
                PathPlan("router" if s is None else f"router-{s}", (), role="router", step=s, dimensions=_LINE)
                for s in steps
            ),
            PathPlan("attention", (), role="attention", dimensions={"B": "rows", "C": "tokens"}),
            *_weights_of_hops(layers, in_one_file=target.conditional_layers),
        )

    def single_graph(self, contract: Radial, layers: int, layer_capacity: float, *, target: Target) -> PathPlan:
        if contract.cache_policy == "layer" and contract.max_steps > 1 and target.appends_once:
            raise DynexportError(
                f"--single-graph: expected cache_policy step with --target {target.name}, which appends to a cache "
                "once a run, found layer, whose caches every step appends to; build with our plugins (--plugins), or "
                "leave out --single-graph"
            )
        if layer_capacity < 1 and not target.shares_of_batches:
            raise DynexportError(
                f"layer capacity: expected 1 for batches, as {target.title} builds no graph with a share of rows times "
                f"tokens, found {layer_capacity:g}; give --max-batch 1, or leave out --layer-capacity"
            )
        return PathPlan(
            "model",
            tuple(range(layers)),
            role="paths",
            layer_capacity=layer_capacity,
            chunk=PADDED_CHUNK,
            share_memory=False,
        )

    def programs(self, contract: Radial, plans: tuple[PathPlan, ...], depths: tuple[Depth, ...]) -> tuple[Program, ...]:
        parts = [(plan.role, plan.name) for plan in plans]
        parts += [(part.role, part.name) for plan in plans for part in plan.parts]
        names = {role: tuple(name for found, name in parts if found == role) for role in get_args(Role)}
        if names["paths"]:
            return super().programs(contract, plans, depths)
        before, whole, after = names["before_attention"], names["layer"], names["after_attention"]
        (embedding,), (attention,), (head,) = names["embedding"], names["attention"], names["head"]
        found = GraphSet(
            embedding=embedding,
            routers=names["router"] * (contract.max_steps if contract.router.shared else 1),
            attention=attention,
            before_attention=before,
            after_attention=after,
            layers=whole,
            head=head,
        )
        prompt = Program(phase="prompt", set=found)
        if not names["decode"]:
            return prompt, Program(phase="decode", set=found)
        return prompt, Program(phase="decode", graph=names["decode"][0])

    def places(self, contract: Radial, layers: int) -> int:
        return contract.places(layers)

    def slots(self, contract: Radial, place: int, max_length: int, plans: tuple[PathPlan, ...]) -> SlotRule:
        return SlotRule(per_token=contract.entries_per_token, slack=plans[0].chunk or 0)

    def routing(self, contract: Radial, plans: tuple[PathPlan, ...]) -> PathRouting:
        return PathRouting(
            hops=contract.max_steps,
            min_hops=contract.min_steps,
            exit=contract.exit,
            reuse=contract.allow_reuse,
            places="hops" if contract.cache_policy == "step" else "layers",
            layer_capacity=plans[0].layer_capacity or 1.0,
        )

    def limits(self, contract: Radial, max_length: int, plans: tuple[PathPlan, ...]) -> Limits:
        capacity = plans[0].layer_capacity
        if capacity is None:
            return Limits(together="always")
        # With cache_policy layer, later hops append to caches that are not empty, and attention takes several tokens of
        # several rows in one call only on empty caches.
        together: Literal["empty", "never"] = "empty" if contract.cache_policy == "step" else "never"
        return Limits(prompt=plans[0].chunk, together=together, compete=capacity < 1)

    def router_weights(self, contract: Radial, architecture: Architecture) -> int:
        hidden, inner = architecture.hidden_size, contract.router.hidden
        return hidden + inner * (hidden + contract.choices(architecture.layers))

    def build(
        self,
        plan: PathPlan,
        architecture: Architecture,
        target: Target,
        contract: Radial,
        checkpoint: Checkpoint,
    ) -> tuple[ir.Model, CausalLM]:
        _check_alike(architecture)
        model = CausalLM(target, architecture, _MODULES.get(plan.role, plan.layers))
        return build_part(plan.name, model, target, _content(plan, model, target, contract)), model

    def manifest_differences(self, manifest: Manifest) -> Iterator[str]:
        assert isinstance(manifest.contract, Radial)
        contract, routing = manifest.contract, manifest.routing
        assert isinstance(routing, PathRouting)
        expected = (contract.max_steps, contract.min_steps, contract.exit, contract.allow_reuse)
        yield from unequal("manifest: paths", expected, (routing.hops, routing.min_hops, routing.exit, routing.reuse))
        places = contract.places(manifest.model.layers)
        yield from unequal("manifest: caches", places, len(manifest.caches))

    def graph_differences(self, graph: GraphFile, manifest: Manifest) -> Iterator[str]:
        assert isinstance(manifest.contract, Radial)
        return path_differences(graph, manifest, manifest.contract)

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, Radial)
        assert isinstance(manifest.routing, PathRouting)
        return RadialOracle(weights, manifest.contract, manifest.routing.layer_capacity, manifest.limits.prompt)


def _weights_of_hops(layers: int, *, in_one_file: bool) -> tuple[PathPlan, ...]:
    """Return the plans of layers and head: one file of which a call runs a part, or a graph of each."""
    pool = tuple(range(layers))
    if in_one_file:
        return (PathPlan("pool", pool, role="pool", dimensions=_LINE, parts=pool_parts(layers)),)
    return (
        *(PathPlan(f"layer-{i}-before", (i,), role="before_attention", dimensions=_LINE) for i in pool),
        *(PathPlan(f"layer-{i}-after", (i,), role="after_attention", dimensions=_LINE) for i in pool),
        PathPlan("head", (), role="head", dimensions={"N": "line_of_logits"}),
    )


def _content(plan: PathPlan, model: CausalLM, target: Target, contract: Radial) -> WriteGraph:
    """Return the writer of a graph, and add the modules that it needs to the model."""
    architecture = model.architecture
    every_step, gated = range(contract.max_steps), contract.gate == "probability"
    if plan.role == "decode":
        routers = _routers(model, target, contract, every_step)
        if isinstance(target, PluggedOnnxRuntime):
            layer = SelectedOnnxRuntime(target, architecture.layers)
            return selected_decode_graph(model, architecture, layer, contract, routers)
        return decode_graph(model, architecture, SelectedLayer(target, architecture.layers), contract, routers)
    if plan.layer_capacity is not None:
        routers = _routers(model, target, contract, every_step)
        return single_graph(architecture, target, contract, routers, plan.layer_capacity)
    if plan.role == "router":
        (module,) = _routers(model, target, contract, [plan.step or 0])
        return parts.router(architecture, target, contract.choices(architecture.layers), module, gated=gated)
    if plan.role == "pool":
        return pool_graph(architecture, target, contract, gated=gated)
    if plan.role == "attention":
        return parts.attention(architecture, target, contract)
    if plan.role == "after_attention":
        return parts.after_attention(architecture, target, gated=gated)
    by_role = {"embedding": parts.embedding, "head": parts.head, "before_attention": parts.before_attention}
    return by_role[plan.role](architecture, target)


def _routers(model: CausalLM, target: Target, contract: Radial, steps: Sequence[int]) -> list[Router]:
    """Add the routers of some hops to the model, under the contract's names."""
    architecture = model.architecture

    def module(name: str | None = None) -> Router:
        return Router(target, architecture, contract.router.hidden, contract.choices(architecture.layers), name)

    if contract.router.shared:
        model.model.radial_router = module()
        return [model.model.radial_router] * len(steps)
    model.model.radial_router = nn.ModuleList([])
    routers = [module(f"radial_router.{step}") for step in steps]
    for step, router in zip(steps, routers, strict=True):
        setattr(model.model.radial_router, str(step), router)
    return routers


def _check_selection(contract: Radial, target: Target) -> None:
    """Raise DynexportError for a contract or precision that the decode graph with custom operators cannot run."""
    if contract.cache_policy == "layer":
        raise DynexportError(
            "--plugins: expected cache_policy step for radial, as the graph that decodes appends to a cache once, "
            "found layer; leave out --plugins"
        )
    if target.precision in ("int8", "int4"):
        raise DynexportError(
            "--plugins: expected precision fp32, fp16 or bf16 for radial, as SelectedMatMul takes floats only, "
            f"found {target.precision}; leave out --plugins"
        )


def _check_alike(architecture: Architecture) -> None:
    """Raise DynexportError for layers that make no pool: they share caches, attention and the router's norm."""
    check_alike("radial", architecture, range(architecture.layers))
    if architecture.sliding_positions is not None:
        raise DynexportError(
            f"radial: expected one set of rotary positions, found {architecture.family}, whose layers with a window "
            "have a set of their own"
        )
    if not architecture.pre_norms:
        raise DynexportError(
            f"radial: expected layers with an input norm, as routers have its epsilon, found {architecture.family}"
        )
    if architecture.experts is not None:
        raise DynexportError(f"radial: expected a pool of layers without experts, found {architecture.family}")
    if len(set(architecture.windows)) > 1:
        raise DynexportError(
            f"radial: expected a pool of layers with one sliding window, found {architecture.family} with "
            f"{sorted({str(window) for window in architecture.windows})}"
        )


STRATEGY = RadialStrategy()
