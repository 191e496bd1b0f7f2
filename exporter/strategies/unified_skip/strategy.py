"""Unified Layer Skipping (arXiv 2404.06954): the prompt at full depth, generated tokens in the kept layers only.

The whole layer, including its cache append, is inside an ONNX ``If``: a skipped layer reads no weights and adds no
entry. Where attention cannot be inside an ``If``, and with ``--static``, every ratio has a graph of its kept layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.graph.writer import ConditionalWriter, LayerWriter
from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import Case, KeptOracle, Oracle
from dynexport.exporter.reference.hugging_face import BoolArray
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.fixed_depths import skipped_together
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime.bundle.contract import AnyContract, SkipRule, UnifiedSkip
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import FULL, Depth, Manifest, ProfileName, Program

# So that the ratio layers / count keeps count layers, whichever way the division was rounded.
_ROUNDING = 1e-9


def kept_layers(rule: SkipRule, ratio: float, layers: int) -> tuple[int, ...]:
    """Return the layers that a generated token runs at a target ratio, ascending.

    ``official`` is the rule of the paper's published code, ``balanced`` spreads layers evenly for any ratio, and
    ``modulo`` is the rule in secondary descriptions; docs/routing-contract.md has the formulas.

    Raises:
        DynexportError: when the ratio leaves fewer than two layers, or ``modulo`` gets a fraction.
    """
    if ratio == 1:
        return tuple(range(layers))
    count = int(layers / ratio)
    if rule == "balanced" and ratio <= layers:
        count = max(2, count)
    if count < 2:
        raise DynexportError(
            f"speedup {ratio:g}: expected a ratio that keeps at least 2 of {layers} layers (at most {layers / 2:g}), "
            f"found one that keeps {count}"
        )
    if rule == "balanced":
        return tuple(sorted({round(j * (layers - 1) / (count - 1)) for j in range(count)}))
    if rule == "modulo":
        if ratio != int(ratio):
            raise DynexportError(f"speedup {ratio:g}: expected an integer for the rule modulo, found a fraction")
        lowest = [i for i in range(layers - 1) if i % int(ratio) == 0]
        return (*lowest[: count - 1], layers - 1)
    gap = int(layers / (count - 1))
    inner = [i for i in range(1, layers - 1) if i % gap == 0]
    return (0, *inner[: count - 2], layers - 1)


def kept_by_order(order: Sequence[int], ratio: float, layers: int) -> tuple[int, ...]:
    """Return the layers that a generated token runs at a target ratio, ascending, where ``order`` says which go first.

    Raises:
        DynexportError: when the order names a layer that the model lacks, or fewer layers than the ratio leaves out.
    """
    wrong = [layer for layer in order if not 0 <= layer < layers]
    if wrong:
        raise DynexportError(f"order: expected layers 0..{layers - 1}, found {wrong[0]}")
    gone = layers - int(layers / ratio + _ROUNDING)
    if gone > min(len(order), layers - 1):
        raise DynexportError(
            f"speedup {ratio:g}: expected an order of at least {gone} layers, all but one at most, found {len(order)}"
        )
    return tuple(sorted(set(range(layers)) - set(order[:gone])))


def _kept(contract: UnifiedSkip, ratio: float, layers: int) -> tuple[int, ...]:
    if contract.order is not None:
        return kept_by_order(contract.order, ratio, layers)
    return kept_layers(contract.rule, ratio, layers)


def _declared(keep: tuple[int, ...], layers: int) -> Depth:
    """Return the depth of a set of kept layers that the user gave."""
    wrong = [i for i in keep if not 0 <= i < layers]
    if wrong:
        raise DynexportError(f"keep: expected layers 0..{layers - 1}, found {wrong[0]}")
    return Depth(name="keep", ratio=None, keep=tuple(sorted(set(keep))), prompt=tuple(range(layers)))


class UnifiedSkipStrategy(Strategy[UnifiedSkip, GraphPlan]):
    """One graph with a condition per layer; or, static, a full graph and one graph of kept layers per ratio."""

    name = "unified-skip"
    summary = "prompt in every layer, generated tokens in a fixed share of them"
    has_ratios = True
    sample = "skip-2"

    def depths(self, contract: UnifiedSkip, layers: int) -> tuple[Depth, ...]:
        if contract.keep is not None:
            return (_declared(contract.keep, layers),)
        return tuple(
            # All digits, so that two ratios never share a name; the name is also part of the graph's file name.
            Depth(
                name=str(ratio).removesuffix(".0"),
                ratio=ratio,
                keep=_kept(contract, ratio, layers),
                prompt=tuple(range(layers)),
            )
            for ratio in contract.speedups
        )

    def graphs(
        self, contract: UnifiedSkip, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        everything = tuple(range(layers))
        if target.conditional_layers and not static:
            return (GraphPlan("model", everything, conditional=True),)

        def plan(name: str, kept: tuple[int, ...], *serves: ProfileName) -> GraphPlan:
            return GraphPlan(name, kept, together=skipped_together(kept, depths), serves=serves)

        decode = (plan(f"decode-{depth.name}", depth.keep, "decode") for depth in depths)
        return (plan("model", everything, "prefill", "decode"), *decode)

    def programs(
        self, contract: UnifiedSkip, plans: tuple[GraphPlan, ...], depths: tuple[Depth, ...]
    ) -> tuple[Program, ...]:
        """Return the programs: a conditional graph runs all; else the first runs prompts, the others a depth each."""
        if plans[0].conditional:
            return super().programs(contract, plans, depths)
        first, *others = plans
        decode = [(FULL, first), *((depth.name, plan) for depth, plan in zip(depths, others, strict=True))]
        return (
            Program(phase="prompt", graph=first.name),
            *(Program(phase="decode", depth=depth, graph=plan.name) for depth, plan in decode),
        )

    def is_trained(self, contract: UnifiedSkip, depth: Depth, declared: AnyContract) -> bool:
        if not isinstance(declared, UnifiedSkip) or declared.keep != contract.keep:
            return False
        same = (declared.rule, declared.order) == (contract.rule, contract.order)
        return declared.keep is not None or (same and depth.ratio in declared.speedups)

    def writer(self, plan: GraphPlan, architecture: Architecture, target: Target, contract: UnifiedSkip) -> LayerWriter:
        return ConditionalWriter(plan, architecture, target)

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        return KeptOracle(weights, _runs)


def _runs(case: Case, layers: int) -> BoolArray:
    """Return which tokens of a case run in which layer, bool [layers, length]."""
    (_, first), *later = case.prompted
    return unified_skip_runs(first, len(case.tokens), case.depth.keep, layers, segments=later)


STRATEGY = UnifiedSkipStrategy()
