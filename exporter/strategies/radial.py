"""Radial Networks (arXiv 2404.04900): a router sends every token to its next layer of a pool, or out.

On ONNX Runtime a bundle is a set of small graphs that the runtime calls in turn: only the chosen layer is touched, no
weight is held twice, and caches stay where they are (docs/architecture.md, "Paths through a pool").
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.architecture import Architecture
from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.graph import radial
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.plan import GraphPlan
from dynexport.exporter.reference import Oracle, RadialOracle
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.exporter.targets.target import Target
from dynexport.runtime.contract import AnyContract, Radial
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Manifest, Speedup


class RadialStrategy(Strategy):
    """A set of graphs; which layer comes next is a graph's output."""

    name = "radial"
    summary = "a router sends every token to its next layer"

    def speedups(self, contract: AnyContract, layers: int) -> tuple[Speedup, ...]:
        return ()

    def graphs(
        self, contract: AnyContract, speedups: tuple[Speedup, ...], layers: int, *, static: bool
    ) -> tuple[GraphPlan, ...]:
        assert isinstance(contract, Radial)
        if static:
            raise DynexportError("--static: expected with --strategy unified-skip or mod, found radial")
        pool = range(layers)
        steps = [None] if contract.router.shared else range(contract.max_steps)
        return (
            GraphPlan("embedding", (), role="embedding"),
            *(GraphPlan("router" if s is None else f"router-{s}", (), role="router", step=s) for s in steps),
            *(GraphPlan(f"layer-{i}-before", (i,), role="before_attention") for i in pool),
            GraphPlan("attention", (0,), role="attention"),
            *(GraphPlan(f"layer-{i}-after", (i,), role="after_attention") for i in pool),
            GraphPlan("head", (), role="head"),
        )

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
        model = CausalLM(target, architecture, plan.layers)
        if plan.role == "router":
            write = self._router(model, plan, architecture, target, contract)
        elif plan.role == "attention":
            write = radial.attention(architecture, tagged=contract.cache_policy == "layer")
        elif plan.role == "after_attention":
            write = radial.after_attention(architecture, gated=contract.gate == "probability")
        else:
            parts = {"embedding": radial.embedding, "head": radial.head, "before_attention": radial.before_attention}
            write = parts[plan.role](architecture)
        return radial.build_part(plan.name, model, target, write), model

    def oracle(self, checkpoint: Checkpoint, manifest: Manifest, *, streaming: bool) -> Oracle:
        assert isinstance(manifest.contract, Radial)
        return RadialOracle(checkpoint, manifest.contract, streaming=streaming)

    def _router(
        self, model: CausalLM, plan: GraphPlan, architecture: Architecture, target: Target, contract: Radial
    ) -> radial.Write:
        """Give the model its router, under the name that the contract has for it."""
        choices = contract.choices(architecture.layers)
        module = radial.Router(target, architecture, contract.router.hidden, choices)
        if plan.step is None:
            model.model.radial_router = module
        else:
            model.model.radial_router = nn.ModuleList([])
            model.model.radial_router._register_child(str(plan.step), module)
        return radial.router(architecture, choices, module)


def _check_alike(architecture: Architecture) -> None:
    """A pool's layers stand for each other: they share caches, and one attention."""
    if len(set(architecture.windows)) > 1:
        raise DynexportError(
            f"radial: expected a pool of layers with one sliding window, found {architecture.family} with "
            f"{sorted({str(window) for window in architecture.windows})}"
        )


STRATEGY = RadialStrategy()
