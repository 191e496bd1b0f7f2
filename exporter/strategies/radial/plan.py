"""The graph plan of Radial Networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynexport.exporter.lowering.plan import GraphPlan, PartPlan

Role = Literal[
    "paths",
    "decode",
    "embedding",
    "router",
    "pool",
    "before_attention",
    "attention",
    "after_attention",
    "layer",
    "head",
]


@dataclass(frozen=True)
class PoolPart(PartPlan):
    """The plan of one part of the pool.

    Attributes:
        role: what the part is in a graph set; "layer" is a whole layer.
    """

    role: Role = "layer"


@dataclass(frozen=True)
class PathPlan(GraphPlan):
    """The plan of one graph.

    Attributes:
        role: "paths" and "decode" are whole-step graphs; the others belong to a graph set, "pool" with
            all weights of layers and head in one file.
        step: the hop that a router belongs to, where every hop has its own router; else None.
        layer_capacity: in a single graph of all hops, the share of a call's tokens that each layer has room for.
    """

    role: Role = "paths"
    parts: tuple[PoolPart, ...] = ()
    step: int | None = None
    layer_capacity: float | None = None


__all__ = ["PathPlan", "PoolPart", "Role"]
