"""Which graphs a Radial bundle has, and what each is in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynexport.exporter.lowering.plan import GraphPlan

Role = Literal["paths", "decode", "embedding", "router", "before_attention", "attention", "after_attention", "head"]


@dataclass(frozen=True)
class PathPlan(GraphPlan):
    """One of its graphs.

    Attributes:
        role: "paths" and "decode" are whole steps; the others are the parts of one that a graph set calls them for.
        step: which step's router it is, where every step has its own.
        layer_capacity: in a single graph of all steps, the share of a step's tokens that each layer has room for.
    """

    role: Role = "paths"
    step: int | None = None
    layer_capacity: float | None = None


__all__ = ["PathPlan", "Role"]
