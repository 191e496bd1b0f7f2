"""Radial Networks (arXiv 2404.04900): a router sends every token to its next layer of a pool, or out.

On ONNX Runtime a bundle is a set of small graphs that the runtime calls in turn: only the chosen layer is touched, no
weight is held twice, and caches stay where they are (docs/architecture.md, "Paths through a pool"). For engines that
want one graph there is one, in which every layer runs in every step. With our plugins a graph decodes beside the set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph import radial
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.radial_decode import decode_graph
from dynexport.exporter.graph.radial_single import single_graph
from dynexport.exporter.lowering.plan import PADDED_CHUNK, GraphPlan, Role, SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.lowering.tensorrt.selected import SelectedLayer
from dynexport.exporter.reference import Oracle, RadialOracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import AnyContract, Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, GraphSet, Limits, Manifest, PathRouting, Program


class RadialStrategy(Strategy):
    """A set of graphs, in which the layer that comes next is a graph's output; or a single one."""

    name = "radial"
    summary = "a router sends every token to its next layer"
    tensors = r"(model\.)?radial_router\..+"

    def speedups(self, contract: AnyContract, layers: int) -> tuple[Depth, ...]:
        return ()

    def graphs(
        self, contract: AnyContract, speedups: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        assert isinstance(contract, Radial)
        if static:
            raise DynexportError(
                "--static: expected with --strategy unified-skip or mod, found radial; for a static graph of that "
                "give --single-graph"
            )
        pool = range(layers)
        steps = [None] if contract.router.shared else range(contract.max_steps)
        decode = GraphPlan("decode", tuple(pool), role="decode", serves=("decode",))
        return (
            # First: the set's weights lie within those that it has stacked.
            *([decode] if target.plugins else []),
            GraphPlan("embedding", (), role="embedding"),
            *(GraphPlan("router" if s is None else f"router-{s}", (), role="router", step=s) for s in steps),
            *(GraphPlan(f"layer-{i}-before", (i,), role="before_attention") for i in pool),
            GraphPlan("attention", (0,), role="attention"),
            *(GraphPlan(f"layer-{i}-after", (i,), role="after_attention") for i in pool),
            GraphPlan("head", (), role="head"),
        )

    def programs(
        self, contract: AnyContract, plans: tuple[GraphPlan, ...], depths: tuple[Depth, ...]
    ) -> tuple[Program, ...]:
        assert isinstance(contract, Radial)
        names = {role: [plan.name for plan in plans if plan.role == role] for role in get_args(Role)}
        if names["paths"]:
            return super().programs(contract, plans, depths)
        (embedding,), (attention,), (head,) = names["embedding"], names["attention"], names["head"]
        found = GraphSet(
            embedding=embedding,
            routers=tuple(names["router"] * (contract.max_steps if contract.router.shared else 1)),
            before_attention=tuple(names["before_attention"]),
            attention=attention,
            after_attention=tuple(names["after_attention"]),
            head=head,
        )
        decode = (
            Program(phase="decode", graph=names["decode"][0]) if names["decode"] else Program(phase="decode", set=found)
        )
        return Program(phase="prompt", set=found), decode

    def places(self, contract: AnyContract, layers: int) -> int:
        assert isinstance(contract, Radial)
        return contract.places(layers)

    def slots(self, contract: AnyContract, place: int, max_length: int, plans: tuple[GraphPlan, ...]) -> SlotRule:
        assert isinstance(contract, Radial)
        return SlotRule(
            per_token=contract.entries_per_token, slack=0 if plans[0].layer_capacity is None else PADDED_CHUNK
        )

    def routing(self, contract: AnyContract, plans: tuple[GraphPlan, ...]) -> PathRouting:
        assert isinstance(contract, Radial)
        return PathRouting(
            hops=contract.max_steps,
            min_hops=contract.min_steps,
            exit=contract.exit,
            reuse=contract.allow_reuse,
            places="hops" if contract.cache_policy == "step" else "layers",
            layer_capacity=plans[0].layer_capacity or 1.0,
        )

    def limits(self, contract: AnyContract, max_length: int, plans: tuple[GraphPlan, ...]) -> Limits:
        assert isinstance(contract, Radial)
        capacity = plans[0].layer_capacity
        if capacity is None:
            return Limits(together="always")
        # A layer's cache is appended to in every hop, where attention takes several tokens of rows together only on
        # empty ones.
        together = "empty" if contract.cache_policy == "step" else "never"
        return Limits(prompt=PADDED_CHUNK, together=together, compete=capacity < 1)

    def router_weights(self, contract: AnyContract, architecture: Architecture) -> int:
        assert isinstance(contract, Radial)
        hidden, inner = architecture.hidden_size, contract.router.hidden
        return hidden + inner * (hidden + contract.choices(architecture.layers))

    def single_graph(self, contract: AnyContract, layers: int, layer_capacity: float) -> GraphPlan:
        return GraphPlan("model", tuple(range(layers)), role="paths", layer_capacity=layer_capacity)

    def build(
        self,
        plan: GraphPlan,
        architecture: Architecture,
        target: Target,
        contract: AnyContract,
        checkpoint: Checkpoint,
    ) -> tuple[ir.Model, CausalLM]:
        assert isinstance(contract, Radial)
        _check_alike(architecture)
        model = CausalLM(target, architecture, () if plan.role == "decode" else plan.layers)
        gated = contract.gate == "probability"
        if plan.role == "decode":
            target.check_selection(contract)
            routers = _routers(model, architecture, target, contract, range(contract.max_steps))
            write = decode_graph(model, architecture, SelectedLayer(target, architecture.layers), contract, routers)
        elif plan.layer_capacity is not None:
            target.check_single_graph(contract, plan.layer_capacity)
            routers = _routers(model, architecture, target, contract, range(contract.max_steps))
            write = single_graph(architecture, target, contract, routers, plan.layer_capacity)
        elif plan.role == "router":
            (module,) = _routers(model, architecture, target, contract, [plan.step or 0])
            write = radial.router(architecture, target, contract.choices(architecture.layers), module, gated=gated)
        elif plan.role == "attention":
            write = radial.attention(architecture, target, contract)
        elif plan.role == "after_attention":
            write = radial.after_attention(architecture, target, gated=gated)
        else:
            parts = {"embedding": radial.embedding, "head": radial.head, "before_attention": radial.before_attention}
            write = parts[plan.role](architecture, target)
        return radial.build_part(plan.name, model, target, write), model

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, Radial)
        assert isinstance(manifest.routing, PathRouting)
        return RadialOracle(weights, manifest.contract, manifest.routing.layer_capacity, manifest.limits.prompt)


def _routers(
    model: CausalLM, architecture: Architecture, target: Target, contract: Radial, steps: Sequence[int]
) -> list[radial.Router]:
    """Give the model the routers of these steps, under the names that the contract has for them."""

    def module() -> radial.Router:
        return radial.Router(target, architecture, contract.router.hidden, contract.choices(architecture.layers))

    if contract.router.shared:
        model.model.radial_router = module()
        return [model.model.radial_router] * len(steps)
    model.model.radial_router = nn.ModuleList([])
    routers = [module() for _ in steps]
    for number, router in zip(steps, routers, strict=True):
        model.model.radial_router._register_child(str(number), router)
    return routers


def _check_alike(architecture: Architecture) -> None:
    """A pool's layers stand for each other: they share caches, and one attention."""
    if len(set(architecture.windows)) > 1:
        raise DynexportError(
            f"radial: expected a pool of layers with one sliding window, found {architecture.family} with "
            f"{sorted({str(window) for window in architecture.windows})}"
        )


STRATEGY = RadialStrategy()
