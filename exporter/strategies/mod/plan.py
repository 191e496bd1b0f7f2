"""Which graphs a Mixture-of-Depths bundle has."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.exporter.lowering.plan import GraphPlan


@dataclass(frozen=True)
class RoutedPlan(GraphPlan):
    """One of its graphs.

    Attributes:
        padded: whether routed layers run a fixed share of the tokens, whatever was chosen.
    """

    padded: bool = False


__all__ = ["RoutedPlan"]
