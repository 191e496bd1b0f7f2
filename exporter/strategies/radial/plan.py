"""The graph plan of Radial Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynexport.exporter.lowering.plan import GraphPlan

Role = Literal["paths", "decode", "embedding", "router", "before_attention", "attention", "after_attention", "head"]


@dataclass(frozen=True)
class PathPlan(GraphPlan):
    """The plan of one graph.

    Attributes:
        role: "paths" and "decode" are whole-step graphs; the others are parts of a graph set.
        step: the hop that a router belongs to, where every hop has its own router; else None.
        layer_capacity: in a single graph of all hops, the share of a call's tokens that each layer has room for.
    """

    role: Role = "paths"
    step: int | None = None
    layer_capacity: float | None = None


__all__ = ["PathPlan", "Role"]
