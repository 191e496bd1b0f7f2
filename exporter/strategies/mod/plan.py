"""The graph plan of Mixture-of-Depths."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.exporter.lowering.plan import GraphPlan


@dataclass(frozen=True)
class RoutedPlan(GraphPlan):
    """The plan of one graph.

    Attributes:
        padded: true if routed layers run a fixed number of tokens that does not depend on the decisions.
    """

    padded: bool = False


__all__ = ["RoutedPlan"]
