"""Early exit (LayerSkip, arXiv 2404.16710): a token runs E layers, then the final norm and the head.

On ONNX Runtime one graph has a condition for every layer after the first exit. Where attention cannot be inside an
``If``, and with ``--static``, every exit has a graph of its layers; all graphs share the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.writer import ConditionalWriter, LayerWriter
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Case, KeptOracle, Oracle
from dynexport.exporter.reference.hugging_face import BoolArray
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.early_exit.reference import early_exit_runs
from dynexport.exporter.strategies.fixed_depths import plans_of_depths, programs_of_depths
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import AnyContract, EarlyExit
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Manifest, Program


class EarlyExitStrategy(Strategy[EarlyExit, GraphPlan]):
    """One graph with conditions after the first exit; or, static, a full graph and one graph per exit."""

    name = "early-exit"
    summary = "generated tokens in the first layers only"

    def check_fields(self, fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        if "exits" not in fields:
            raise DynexportError(
                f"{checkpoint.source}: contract: exits: expected after how many layers tokens may leave, in "
                "config.json or with --exit 4 (--set 'exits=[4]'), found none"
            )

    def depths(self, contract: EarlyExit, layers: int) -> tuple[Depth, ...]:
        if contract.exits[-1] >= layers:
            raise DynexportError(f"exits: expected 1..{layers - 1} of {layers} layers, found {contract.exits[-1]}")
        everything = tuple(range(layers))
        return tuple(
            Depth(
                name=f"exit-{after}",
                ratio=layers / after,
                keep=everything[:after],
                prompt=everything if contract.prompt == "full" else everything[:after],
            )
            for after in contract.exits
        )

    def graphs(
        self, contract: EarlyExit, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        always = tuple(range(contract.exits[0]))
        return plans_of_depths(depths, layers, always, conditional=target.conditional_layers and not static)

    def programs(
        self, contract: EarlyExit, plans: tuple[GraphPlan, ...], depths: tuple[Depth, ...]
    ) -> tuple[Program, ...]:
        return tuple(programs_of_depths(plans, depths))

    def is_trained(self, contract: EarlyExit, depth: Depth, declared: AnyContract) -> bool:
        return (
            isinstance(declared, EarlyExit) and declared.prompt == contract.prompt and len(depth.keep) in declared.exits
        )

    def writer(self, plan: GraphPlan, architecture: Architecture, target: Target, contract: EarlyExit) -> LayerWriter:
        return ConditionalWriter(plan, architecture, target)

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, EarlyExit)
        return KeptOracle(weights, partial(_runs, manifest.contract))

    def describe(self, manifest: Manifest) -> list[tuple[str, str]]:
        assert isinstance(manifest.contract, EarlyExit)
        where = "in every layer" if manifest.contract.prompt == "full" else "to the exit of their request"
        return [("prompts", where)]


def _runs(contract: EarlyExit, case: Case, layers: int) -> BoolArray:
    """Return which tokens of a case run in which layer, bool [layers, length]."""
    return early_exit_runs(case.prompted, len(case.tokens), len(case.depth.keep), layers, prompt=contract.prompt)


STRATEGY = EarlyExitStrategy()
