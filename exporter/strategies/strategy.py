"""The interface of a routing strategy: its depths, graphs, programs, caches, limits and reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

# The phase that each optimization profile serves.
PHASES: dict[m.ProfileName, m.Phase] = {"prefill": "prompt", "decode": "decode"}
ContractT = TypeVar("ContractT", bound=AnyContract)
PlanT = TypeVar("PlanT", bound=GraphPlan)


@dataclass(frozen=True)
class CostPart:
    """The weights of a layer that depend on one decision: regular expressions of their names within the layer.

    Attributes:
        layer: the layer's number.
        run: the weights that only running tokens need.
        skip: the weights that only skipping tokens need.
    """

    layer: int
    run: str
    skip: str


class Strategy(ABC, Generic[ContractT, PlanT]):
    """A routing strategy; docs/routing-contract.md defines each one.

    ``ContractT`` is its class in ``runtime/bundle/contract.py``; ``PlanT`` is ``GraphPlan`` or a subclass.

    Attributes:
        name: the name on the command line and in contracts.
        summary: a short description for users.
        tensors: a regular expression for the names of the router tensors; "" without routers.
        has_ratios: true if its contract has the fields speedups, rule and keep.
        importers: importers of checkpoints that other routing code wrote.
        untrained: what a checkpoint that does not declare a depth means for it, a sentence with the depth's name.
        sample: the name of the repository's trained sample; "" without one.
        plugin_fields: the contract fields and values with which its graphs use dynexport's custom operators; None if
            they never do.
    """

    name: str
    summary: str
    tensors: str = ""
    has_ratios: bool = False
    importers: tuple[Importer, ...] = ()
    untrained: str = (
        "this checkpoint does not declare that it was trained to skip layers as the ratio {} does; expect worse text "
        "the more layers are skipped"
    )
    sample: str = ""
    plugin_fields: Mapping[str, Any] | None = None

    def declares(self, architecture: Architecture) -> dict[str, Any] | None:
        """Return the contract's fields of a config without ``dynexport``, for a family whose own fields say it."""
        return None

    def check_fields(self, fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        """Raise DynexportError, with a suggestion, for missing contract fields; the default accepts all."""

    def without_int8_caches(self, contract: ContractT) -> str:
        """Return why graphs may not have int8 KV caches, a clause about the strategy; by default "", they may."""
        return ""

    def norm_epsilons(self, contract: ContractT) -> Mapping[str, float]:
        """Return patterns of names of weights -> the epsilons of their norms, where they are not the family's."""
        return {}

    def check(self, contract: ContractT, architecture: Architecture, target: Target) -> None:
        """Raise DynexportError for a contract that the target cannot run; the default accepts all."""

    def architecture(self, contract: ContractT, architecture: Architecture) -> Architecture:
        """Return the architecture with the layers that a token runs at full depth; by default each of them once.

        Raises:
            DynexportError: for layers that the model does not have.
        """
        return architecture

    @abstractmethod
    def depths(self, contract: ContractT, layers: int) -> tuple[Depth, ...]:
        """Return the depths beside full depth. Raises DynexportError for layers that the model does not have."""

    @abstractmethod
    def graphs(
        self, contract: ContractT, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[PlanT, ...]:
        """Return the plans of the graphs to write, in order.

        The first whole-step graph that takes any number of tokens runs prompts at full depth.

        Args:
            contract: the strategy's contract.
            depths: the result of ``depths``.
            layers: number of layers of the model.
            target: the engine that the graphs are written for.
            static: true asks for graphs without conditions.

        Raises:
            DynexportError: for a form that the strategy or the target does not support.
        """

    def single_graph(self, contract: ContractT, layers: int, layer_capacity: float, *, target: Target) -> PlanT:
        """Return the plan of one graph without conditions that replaces those of ``graphs``.

        Args:
            contract: the strategy's contract.
            layers: number of layers of the model.
            layer_capacity: share of a call's tokens that every layer has room for.
            target: the engine that the graph is written for.

        Raises:
            DynexportError: if the strategy or the target does not support such a graph.
        """
        raise DynexportError(
            f"--single-graph: expected a strategy that has such a graph, found {self.name}; omit the option"
        )

    def unused(self, contract: ContractT) -> dict[str, str]:
        """Return regular expressions of router tensors that a contract does not use, with the reasons."""
        return {}

    def programs(
        self, contract: ContractT, plans: tuple[PlanT, ...], depths: tuple[Depth, ...]
    ) -> tuple[m.Program, ...]:
        """Return the program of each phase and depth; by default a graph runs the phases it serves at every depth."""
        return tuple(m.Program(phase=PHASES[served], graph=plan.name) for plan in plans for served in plan.serves)

    def places(self, contract: ContractT, layers: int) -> int:
        """Return the number of KV caches of a row; by default one per layer."""
        return layers

    def slots(self, contract: ContractT, place: int, max_length: int, plans: tuple[PlanT, ...]) -> SlotRule:
        """Return the rule for a cache's entries and slots; by default one of each per token."""
        return SlotRule()

    def routing(self, contract: ContractT, plans: tuple[PlanT, ...]) -> m.LayerRouting | m.PathRouting | None:
        """Return the routers' decisions for the manifest; by default there are no routers."""
        return None

    def limits(self, contract: ContractT, max_length: int, plans: tuple[PlanT, ...]) -> m.Limits:
        """Return the strategy's limits for a call; by default several prompts share a call on empty caches."""
        return m.Limits()

    def is_trained(self, contract: ContractT, depth: Depth, declared: AnyContract) -> bool:
        """Return whether a checkpoint with the contract ``declared`` was trained to run at a depth."""
        return False

    def cost_parts(self, contract: ContractT) -> tuple[CostPart, ...]:
        """Return the weights that depend on each decision about a token; by default the decision is about a layer."""
        return ()

    def router_weights(self, contract: ContractT, architecture: Architecture) -> int:
        """Return the number of float32 weights that one choice of the next layer reads; by default 0."""
        return 0

    def read_by(self, contract: ContractT, layers: int) -> Mapping[str, Sequence[int]]:
        """Return the weights outside of layers that steps do not read once, and the layers that each is read with."""
        return {}

    def build(
        self,
        plan: PlanT,
        architecture: Architecture,
        target: Target,
        contract: ContractT,
        checkpoint: Checkpoint,
    ) -> tuple[ir.Model, CausalLM]:
        """Return a graph and its modules, whose weights have no values yet; by default a whole-step graph."""
        model = CausalLM(target, architecture, plan.layers)
        self.attach(model, contract, checkpoint, target)
        return build_graph(plan, model, target, self.writer(plan, architecture, target, contract)), model

    def attach(self, model: CausalLM, contract: ContractT, checkpoint: Checkpoint, target: Target) -> None:
        """Add the modules that routing needs to the model's layers; by default none."""

    def writer(self, plan: PlanT, architecture: Architecture, target: Target, contract: ContractT) -> LayerWriter:
        """Return the writer of the layers of a whole-step graph; by default all of them run."""
        return LayerWriter(plan, architecture, target)

    def manifest_differences(self, manifest: Manifest) -> Iterator[str]:
        """Yield the differences between a manifest and its contract, one line each; by default none."""
        return iter(())

    def graph_differences(self, graph: GraphFile, manifest: Manifest) -> Iterator[str]:
        """Yield the constants of a graph that differ from its contract, one line each; by default none."""
        return iter(())

    @abstractmethod
    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        """Return the PyTorch model that bundles are compared with. Raises DynexportError as ``Reference`` does."""

    def describe(self, manifest: Manifest) -> list[tuple[str, str]]:
        """Return names and values that describe a bundle's routing to users; by default none."""
        return []

    def calibrate(self, bundle: Bundle, ids: Sequence[int], options: CalibrationOptions) -> Calibration:
        """Find thresholds for a bundle's routers on a text; the default raises, as there are no thresholds.

        Args:
            bundle: an opened bundle of this strategy.
            ids: the text's token ids.
            options: the options of the calibration.

        Raises:
            DynexportError: for a bundle without thresholds, or a text or an option out of range.
        """
        raise DynexportError(
            f"{bundle.path}: strategy: expected one whose routers have thresholds to calibrate, found {self.name}"
        )


__all__ = ["ContractT", "CostPart", "PlanT", "Strategy"]
