"""What a strategy decides: how a layer stands in the graph, which graphs a bundle has, which tokens run where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import onnx_ir as ir

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import build_graph
from dynexport.exporter.graph.decoder import CausalLM, DecoderLayer
from dynexport.exporter.graph.step import LayerCache, Step
from dynexport.exporter.lowering.plan import GraphPlan, SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import KeptOracle, Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle import manifest as m
from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Manifest

# The phase that a graph serves by the name of its optimization profile.
PHASES: dict[m.ProfileName, m.Phase] = {"prefill": "prompt", "decode": "decode"}


class Strategy(ABC):
    """One way to route; docs/routing-contract.md says what each means."""

    name: str
    summary: str
    tensors: str = ""
    """Names of the tensors that its routers add to a model, a regular expression."""

    @abstractmethod
    def speedups(self, contract: AnyContract, layers: int) -> tuple[Depth, ...]:
        """The kept set of every declared ratio. Raises DynexportError on one that cannot be met."""

    @abstractmethod
    def graphs(
        self, contract: AnyContract, speedups: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        """The graphs to write, in this order; of those that are whole steps of any number of tokens the first takes
        prompts, at full depth."""

    def unused(self, contract: AnyContract) -> dict[str, str]:
        """Those of its tensors that a contract does not use: regular expression -> why."""
        return {}

    def single_graph(self, contract: AnyContract, layers: int, layer_capacity: float) -> GraphPlan:
        """One graph without conditions instead; raises DynexportError where the strategy has none.

        Args:
            layer_capacity: share of a step's tokens that every layer has room for.
        """
        raise DynexportError(f"--single-graph: expected with --strategy radial, found {self.name}")

    def programs(
        self, contract: AnyContract, plans: tuple[GraphPlan, ...], depths: tuple[m.Depth, ...]
    ) -> tuple[m.Program, ...]:
        """Which graph runs which phase; here, each runs what it serves, at every depth."""
        return tuple(m.Program(phase=PHASES[served], graph=plan.name) for plan in plans for served in plan.serves)

    def places(self, contract: AnyContract, layers: int) -> int:
        """How many KV caches a row has; here, one for every layer."""
        return layers

    def slots(self, contract: AnyContract, place: int, max_length: int, plans: tuple[GraphPlan, ...]) -> SlotRule:
        """How many entries and slots a cache has; here, one for every token."""
        return SlotRule()

    def routing(self, contract: AnyContract, plans: tuple[GraphPlan, ...]) -> m.LayerRouting | m.PathRouting | None:
        """What routers decide, token by token; here, nothing."""
        return None

    def limits(self, contract: AnyContract, max_length: int, plans: tuple[GraphPlan, ...]) -> m.Limits:
        """What a call may have, whatever engines are built for; here, rows go together on empty caches."""
        return m.Limits()

    def is_trained(self, contract: AnyContract, depth: m.Depth, declared: AnyContract) -> bool:
        """Whether a checkpoint that declares a contract was trained to run in a depth's layers alone."""
        return False

    def router_weights(self, contract: AnyContract, architecture: Architecture) -> int:
        """Weights, in float32, that one choice of the next layer reads; here, there is none."""
        return 0

    def build(
        self,
        plan: GraphPlan,
        architecture: Architecture,
        target: Target,
        contract: AnyContract,
        checkpoint: Checkpoint,
    ) -> tuple[ir.Model, CausalLM]:
        """One of them, and its modules, whose weights are still without values; here, a whole step."""
        model = CausalLM(target, architecture, plan.layers)
        self.attach(model, contract, checkpoint, target)
        return build_graph(plan, model, target, contract, self.run_layer), model

    def attach(self, model: CausalLM, contract: AnyContract, checkpoint: Checkpoint, target: Target) -> None:  # noqa: B027
        """Give the model's layers the modules that routing needs; here, none."""

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        """The PyTorch golden; here, whole layers are left out or not. Raises DynexportError as ``Reference`` does."""
        return KeptOracle(weights)

    def run_layer(
        self, op: Any, layer: DecoderLayer, hidden_states: ir.Value, step: Step, cache: LayerCache
    ) -> tuple[ir.Value, LayerCache]:
        """Write one layer into the graph; here, it always runs."""
        return layer(op, hidden_states, step.for_layer(op, layer.index), cache)
