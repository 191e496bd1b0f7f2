"""Dense: every token runs in every layer; the baseline for the other strategies."""

from __future__ import annotations

from dynexport.exporter.lowering.plan import GraphPlan
from dynexport.exporter.lowering.target import Target
from dynexport.exporter.reference import KeptOracle, Oracle
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.strategy import Strategy
from dynexport.runtime.bundle.contract import Dense
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Manifest


class DenseStrategy(Strategy[Dense, GraphPlan]):
    """One graph without conditions and routers."""

    name = "dense"
    summary = "every token in every layer"
    sample = "dense"

    def depths(self, contract: Dense, layers: int) -> tuple[Depth, ...]:
        return ()

    def graphs(
        self, contract: Dense, depths: tuple[Depth, ...], layers: int, *, target: Target, static: bool
    ) -> tuple[GraphPlan, ...]:
        if static:
            raise DynexportError("--static: expected with --strategy unified-skip, found dense, which skips nothing")
        everything = tuple(range(layers))
        return (GraphPlan("model", everything, contiguous=everything),)

    def oracle(self, weights: Weights, manifest: Manifest) -> Oracle:
        return KeptOracle(weights)


STRATEGY = DenseStrategy()
