"""Looped models (Ouro, arXiv 2510.25741; Huginn, 2502.05171): all loops in one graph, which has every weight once.

A run of a layer is what a layer is elsewhere: it has a KV cache, a condition and a cost of its own. On ONNX Runtime the
runs of later loops are conditional; where attention cannot be, and with ``--static``, each number of loops has a graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families import read_architecture
from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.build import build_graph
from dynexport.exporter.graph.decoder import CausalLM
from dynexport.exporter.graph.layers import PLAIN, Linear
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.alike import check_alike
from dynexport.exporter.strategies.fixed_depths import plans_of_depths, programs_of_depths
from dynexport.exporter.strategies.loop.between import Adapter, Between
from dynexport.exporter.strategies.loop.exits import Exits
from dynexport.exporter.strategies.loop.oracle import LoopOracle
from dynexport.exporter.strategies.loop.order import Order
from dynexport.exporter.strategies.loop.rules import Change, Hazard, Rule
from dynexport.exporter.strategies.loop.writer import ExitWriter, LoopWriter, ReusingWriter
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import Loop
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, LayerRouting, Manifest, Program

GATE = "model.early_exit_gate"
ADAPTER_STATE = "model.adapter_state"
# The contract of a family with an adapter, beside its loops and body.
_INJECTED = {"norm_between": False, "norm_after": True, "inject": "adapter"}
_EXITS = {"hazard": "when the gate's probabilities reach", "change": "when a loop changes a state by less than"}
# What becomes of an exited token in later loops.
_EXITED = {
    "compute": "all loops are computed, so that exiting saves nothing",
    "last": "later loops have copies of its last keys and values, and do not run if all tokens have exited",
}


class LoopStrategy(Strategy[Loop, GraphPlan]):
    """One graph with conditions after the first loop; or, static, a full graph and one graph per number of loops."""

    name = "loop"
    summary = "a stack of layers several times, with the same weights"
    untrained = (
        "fewer loops than the checkpoint was trained for may give worse text, the fewer the worse; beside full depth, "
        "this runs {}"
    )
    tensors = re.escape(GATE) + r"\.(weight|bias)"

    def declares(self, architecture: Architecture) -> dict[str, Any] | None:
        found: dict[str, Any] = {"strategy": self.name, "loops": architecture.loops}
        if _has_adapter(architecture):
            return {**found, "body": architecture.loop_body, **_INJECTED}
        if architecture.loops == 1:
            return None
        threshold = architecture.exit_threshold
        leave = {} if threshold is None else {"exit": {"rule": "hazard", "threshold": threshold}}
        return {**found, **leave}

    def check_fields(self, fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        if "loops" not in fields:
            raise DynexportError(
                f"{checkpoint.source}: contract: loops: expected how often the layers run, in config.json or with "
                "--set loops=4, found none"
            )
        declared = checkpoint.config.get("dynexport") or self.declares(read_architecture(checkpoint.config))
        trained = declared.get("loops") if isinstance(declared, dict) else None
        if isinstance(trained, int) and isinstance(fields["loops"], int) and fields["loops"] > trained:
            checkpoint.notes += (
                f"loops: {fields['loops']} are more than the {trained} that the checkpoint declares; expect worse text",
            )

    def check(self, contract: Loop, architecture: Architecture, target: Target) -> None:
        check_alike(self.name, architecture, range(architecture.layers))
        _check_ends(contract, architecture)
        if contract.exit.rule == "none":
            if contract.exited_kv != "compute":
                raise DynexportError(f"exited_kv: expected with an exit rule, found {contract.exited_kv} without one")
            return
        if contract.loops < 2:
            raise DynexportError("exit: expected at least 2 loops to exit from, found 1")
        if contract.exited_kv == "absent":
            raise DynexportError("exited_kv: expected compute or last, found absent, which is not supported")
        if contract.exit.rule == "change" and "threshold" not in contract.exit.model_fields_set:
            raise DynexportError("exit.threshold: expected a number with the rule change, such as 0.03, found none")
        if contract.exited_kv == "last":
            _check_reuse(architecture, target)

    def without_int8_caches(self, contract: Loop) -> str:
        return "whose later loops reuse keys and values with exited_kv last" if contract.exited_kv == "last" else ""

    def unused(self, contract: Loop) -> dict[str, str]:
        rule = contract.exit.rule
        return {} if rule == "hazard" else {self.tensors: f"the contract's exit rule is {rule}"}

    def architecture(self, contract: Loop, architecture: Architecture) -> Architecture:
        return architecture.repeated(Order.of(contract, architecture.layers).layers)

    def depths(self, contract: Loop, layers: int) -> tuple[Depth, ...]:
        if contract.exit.rule != "none":
            return ()
        order = _order(contract, layers)
        runs = [order.with_loops(loops) for loops in range(1, order.loops)]
        return tuple(
            Depth(name=f"loops-{loops}", ratio=layers / len(keep), keep=keep, prompt=keep)
            for loops, keep in enumerate(runs, start=1)
        )

    def graphs(
        self, contract: Loop, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        if contract.exit.rule != "none":
            if static and contract.exited_kv == "last":
                raise DynexportError("--static: expected with exited_kv compute, found last, which needs conditions")
            everything = tuple(range(layers))
            return (GraphPlan("model", everything, contiguous=everything),)
        conditional = target.conditional_layers and not static and bool(depths)
        return plans_of_depths(depths, layers, _order(contract, layers).with_loops(1), conditional=conditional)

    def programs(self, contract: Loop, plans: tuple[GraphPlan, ...], depths: tuple[Depth, ...]) -> tuple[Program, ...]:
        return tuple(programs_of_depths(plans, depths))

    def build(
        self, plan: GraphPlan, architecture: Architecture, target: Target, contract: Loop, checkpoint: Checkpoint
    ) -> tuple[ir.Model, CausalLM]:
        model, order = CausalLM(target, architecture, plan.layers), _order(contract, architecture.layers)
        between = Between(contract, order, model.model.norm, _adapter(contract, model, target))
        if contract.exit.rule == "none":
            return build_graph(plan, model, target, LoopWriter(plan, architecture, target, between)), model
        exits = Exits(_rule(contract, model, target, checkpoint), contract.loops)
        kind = ReusingWriter if contract.exited_kv == "last" else ExitWriter
        return build_graph(plan, model, target, kind(plan, architecture, target, between, exits)), model

    def read_by(self, contract: Loop, layers: int) -> Mapping[str, Sequence[int]]:
        order = _order(contract, layers)
        first = 0 if contract.state_seed is not None else 1
        return {f"{ADAPTER_STATE}.weight": [order.loop(number)[0] for number in range(first, order.loops)]}

    def routing(self, contract: Loop, plans: tuple[GraphPlan, ...]) -> LayerRouting | None:
        if contract.exit.rule == "none":
            return None
        order = _order(contract, len(plans[0].layers))
        return LayerRouting(
            layers=tuple(order.loop(number)[0] for number in range(1, order.loops)),
            span=order.body,
            skipped_kv="kept" if contract.exited_kv == "last" else "computed",
            overflow="residual",
        )

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        assert isinstance(manifest.contract, Loop)
        return LoopOracle(weights, manifest.contract)

    def describe(self, manifest: Manifest) -> list[tuple[str, str]]:
        assert isinstance(manifest.contract, Loop)
        order = _order(manifest.contract, manifest.model.layers)
        body = f"layers {order.before} to {order.before + order.body - 1}"
        between = "with the final norm between" if manifest.contract.norm_between else "without a norm between"
        if manifest.contract.inject == "adapter":
            seed = manifest.contract.state_seed
            between = f"each with its input injected, from {'zeros' if seed is None else f'a random state ({seed})'}"
        leave, kept = manifest.contract.exit, manifest.contract.exited_kv
        exits = (
            [] if leave.rule == "none" else [("exit", f"{_EXITS[leave.rule]} {leave.threshold:.4g}; {_EXITED[kept]}")]
        )
        return [
            ("loops", f"{order.loops} of {body}, {between}"),
            (
                "caches",
                f"one per loop and layer: {order.runs}, of {order.before + order.body + order.after} layers; "
                f"{manifest.cost.kv_per_token} bytes a token each",
            ),
            *exits,
        ]


def _has_adapter(architecture: Architecture) -> bool:
    return f"{ADAPTER_STATE}.weight" in architecture.sources


def _check_ends(contract: Loop, architecture: Architecture) -> None:
    """Raise DynexportError for ends of the body that the model does not have."""
    wanted = "adapter" if _has_adapter(architecture) else "none"
    if contract.inject != wanted:
        raise DynexportError(f"inject: expected {wanted} for {architecture.family}, found {contract.inject}")
    if contract.state_seed is not None and contract.inject == "none":
        raise DynexportError(f"state_seed: expected with an adapter, found {contract.state_seed} without one")
    if contract.norm_after and not _order(contract, architecture.layers).after:
        raise DynexportError("norm_after: expected layers after the body, found none")


def _adapter(contract: Loop, model: CausalLM, target: Target) -> Adapter | None:
    """Return the adapter of the contract, whose modules become the model's; None without one."""
    if contract.inject == "none":
        return None
    decoder, hidden = model.model, model.model.architecture.hidden_size
    state = decoder.adapter_state = Linear(target, hidden, hidden, bias=False)
    injected = decoder.adapter_input = Linear(target, hidden, hidden, bias=False)
    start = None if contract.state_seed is None else contract.start_state(hidden)
    return Adapter(state, injected, start)


def _rule(contract: Loop, model: CausalLM, target: Target, checkpoint: Checkpoint) -> Rule:
    """Return the exit rule; a gate becomes a module of the model."""
    if contract.exit.rule == "change":
        return Change(contract.exit.threshold)
    bias, hidden = GATE + ".bias" in checkpoint.names, model.model.architecture.hidden_size
    gate = model.model.early_exit_gate = Linear(target, hidden, 1, bias=bias, storage=PLAIN)
    return Hazard(gate, model.model.norm, contract.exit.threshold)


def _check_reuse(architecture: Architecture, target: Target) -> None:
    """Raise DynexportError for a target or a model whose keys and values cannot be reused."""
    if not target.conditional_layers:
        raise DynexportError(
            f"exited_kv: expected compute for {target.title}, where no layer can be conditional, found last"
        )
    if target.cache_head_dim(architecture.head_dim) != architecture.head_dim:
        raise DynexportError(
            f"exited_kv: expected compute for heads of {architecture.head_dim} channels, which caches pad, found last"
        )


def _order(contract: Loop, runs: int) -> Order:
    """Return the order of a contract for a model whose tokens have so many runs of layers."""
    if contract.body is None:
        return Order.of(contract, runs // contract.loops)
    first, last = contract.body
    return Order.of(contract, runs - (contract.loops - 1) * (last - first + 1))


STRATEGY = LoopStrategy()
