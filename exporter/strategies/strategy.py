"""What a strategy decides: how a layer stands in the graph, which graphs a bundle has, which tokens run where."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import onnx_ir as ir

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import build_graph
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.reading import GraphFile
from dynexport.exporter.graph.writer import LayerWriter
from dynexport.exporter.lowering.plan import GraphPlan, SlotRule
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.calibration import Calibration, CalibrationOptions
from dynexport.runtime.bundle import manifest as m
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Manifest

# The phase that a graph serves, by the name of its optimization profile.
PHASES: dict[m.ProfileName, m.Phase] = {"prefill": "prompt", "decode": "decode"}
ContractT = TypeVar("ContractT", bound=AnyContract)
PlanT = TypeVar("PlanT", bound=GraphPlan)


class Strategy(ABC, Generic[ContractT, PlanT]):
    """One way to route; docs/routing-contract.md says what each means.

    ``ContractT`` is its class in ``runtime/bundle/contract.py``; ``PlanT`` is ``GraphPlan``, or the strategy's own.

    Attributes:
        name: on the command line and in contracts.
        summary: half a line for users.
        tensors: names of the tensors that its routers add to a model, a regular expression; "" where there are none.
        has_ratios: whether its contract has the fields speedups, rule and keep.
        importers: what reads checkpoints of it that other routing code has written.
        sample: the trained sample of the repository that shows it; "" where there is none.
        plugin_fields: fields of the contract with which its graphs call operators of our own; None: they call none.
    """

    name: str
    summary: str
    tensors: str = ""
    has_ratios: bool = False
    importers: tuple[Importer, ...] = ()
    sample: str = ""
    plugin_fields: Mapping[str, Any] | None = None

    def check_fields(self, fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Raise DynexportError, with what the checkpoint suggests, for fields that a contract lacks; here, for none."""

    def check(self, contract: ContractT, architecture: Architecture, target: Target) -> None:
        """Raise DynexportError, with what to do, for a contract that the target cannot run; here, it runs all."""

    @abstractmethod
    def depths(self, contract: ContractT, layers: int) -> tuple[Depth, ...]:
        """What a request may choose beside full depth. Raises DynexportError for what the model cannot meet."""

    @abstractmethod
    def graphs(
        self, contract: ContractT, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[PlanT, ...]:
        """The graphs to write, in this order; of those that are whole steps of any number of tokens the first takes
        prompts, at full depth. Raises DynexportError for what the target cannot run."""

    def single_graph(self, contract: ContractT, layers: int, layer_capacity: float, *, target: Target) -> PlanT:
        """One graph without conditions instead; raises DynexportError where the strategy or the target has none.

        Args:
            layer_capacity: share of a step's tokens that every layer has room for.
        """
        raise DynexportError(f"--single-graph: expected with --strategy radial, found {self.name}")

    def unused(self, contract: ContractT) -> dict[str, str]:
        """Those of its tensors that a contract does not use: regular expression -> why."""
        return {}

    def programs(
        self, contract: ContractT, plans: tuple[PlanT, ...], depths: tuple[Depth, ...]
    ) -> tuple[m.Program, ...]:
        """Which graph runs which phase; here, each runs what it serves, at every depth."""
        return tuple(m.Program(phase=PHASES[served], graph=plan.name) for plan in plans for served in plan.serves)

    def places(self, contract: ContractT, layers: int) -> int:
        """How many KV caches a row has; here, one for every layer."""
        return layers

    def slots(self, contract: ContractT, place: int, max_length: int, plans: tuple[PlanT, ...]) -> SlotRule:
        """How many entries and slots a cache has; here, one for every token."""
        return SlotRule()

    def routing(self, contract: ContractT, plans: tuple[PlanT, ...]) -> m.LayerRouting | m.PathRouting | None:
        """What routers decide, token by token; here, nothing."""
        return None

    def limits(self, contract: ContractT, max_length: int, plans: tuple[PlanT, ...]) -> m.Limits:
        """What a call may have, whatever engines are built for; here, rows go together on empty caches."""
        return m.Limits()

    def is_trained(self, contract: ContractT, depth: Depth, declared: AnyContract) -> bool:
        """Whether a checkpoint that declares a contract was trained to run in a depth's layers alone."""
        return False

    def router_weights(self, contract: ContractT, architecture: Architecture) -> int:
        """Weights, in float32, that one choice of the next layer reads; here, there is none."""
        return 0

    def build(
        self,
        plan: PlanT,
        architecture: Architecture,
        target: Target,
        contract: ContractT,
        checkpoint: Checkpoint,
    ) -> tuple[ir.Model, CausalLM]:
        """One of the graphs, and its modules, whose weights are still without values; here, a whole step."""
        model = CausalLM(target, architecture, plan.layers)
        self.attach(model, contract, checkpoint, target)
        return build_graph(plan, model, target, self.writer(plan, architecture, target, contract)), model

    def attach(self, model: CausalLM, contract: ContractT, checkpoint: Checkpoint, target: Target) -> None:
        """Give the model's layers the modules that routing needs; here, none."""

    def writer(self, plan: PlanT, architecture: Architecture, target: Target, contract: ContractT) -> LayerWriter:
        """What writes the layers into a whole step; here, all of them run."""
        return LayerWriter(plan, architecture, target)

    def manifest_differences(self, manifest: Manifest) -> Iterator[str]:
        """What a manifest says otherwise than its contract, one line each; here, nothing."""
        return iter(())

    def graph_differences(self, graph: GraphFile, manifest: Manifest) -> Iterator[str]:
        """The constants of a written graph that are not what its contract says, one line each; here, none."""
        return iter(())

    @abstractmethod
    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        """The model in PyTorch that bundles are compared with. Raises DynexportError as ``Reference`` does."""

    def describe(self, manifest: Manifest) -> list[tuple[str, str]]:
        """What people are told of a bundle's routing, names and values; here, nothing."""
        return []

    def calibrate(self, bundle: Bundle, ids: Sequence[int], options: CalibrationOptions) -> Calibration:
        """Find thresholds for its routers on a text; here, they have none.

        Raises:
            DynexportError: when there is no threshold to find, or the text or an option is out of range.
        """
        raise DynexportError(
            f"{bundle.path}: strategy: expected mod, whose routers have thresholds, found {self.name}; name a bundle "
            "that was converted from a Mixture-of-Depths checkpoint"
        )


__all__ = ["ContractT", "PlanT", "Strategy"]
