"""Dense: every token runs in every layer. The baseline that skipping is compared with."""

from __future__ import annotations

from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import AnyContract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth


class DenseStrategy(Strategy):
    """No conditions, no routes."""

    name = "dense"
    summary = "every token in every layer"

    def speedups(self, contract: AnyContract, layers: int) -> tuple[Depth, ...]:
        return ()

    def graphs(
        self, contract: AnyContract, speedups: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        if static:
            raise DynexportError("--static: expected with --strategy unified-skip, found dense, which skips nothing")
        everything = tuple(range(layers))
        return (GraphPlan("model", everything, contiguous=everything),)


STRATEGY = DenseStrategy()
