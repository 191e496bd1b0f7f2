"""Which graphs a bundle has, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dynexport.runtime.bundle.manifest import ProfileName

# Tokens of a row in a run that fills slots whatever was chosen: each costs a slot of every cache that tokens choose.
PADDED_CHUNK = 64
Role = Literal[
    "step", "paths", "decode", "embedding", "router", "before_attention", "attention", "after_attention", "head"
]


@dataclass(frozen=True)
class SlotRule:
    """How many entries a row may have in one cache, and slots; as in ``manifest.Cache``."""

    most: int | None = None
    per_token: int = 1
    slack: int = 0


@dataclass(frozen=True)
class GraphPlan:
    """One graph of a bundle.

    Attributes:
        name: file stem and name in the manifest.
        layers: the layers that it holds.
        conditional: whether it has a ``layer_active`` input that says which of them run.
        contiguous: those whose caches always hold the positions 0, 1, 2, .., as nothing ever skips them.
        together: groups of layers that are only ever skipped together, so that their caches have the same lengths.
        padded: whether routed layers run a fixed share of the tokens, whatever was chosen.
        role: a whole step, or the part of one that a graph set calls it for.
        serves: what it is run for. A graph that only decodes takes one token of every row.
        step: which step's router it is, where every step has its own.
        layer_capacity: in a single graph of all steps, the share of a step's tokens that each layer has room for.
    """

    name: str
    layers: tuple[int, ...]
    conditional: bool = False
    contiguous: tuple[int, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    padded: bool = False
    role: Role = "step"
    serves: tuple[ProfileName, ...] = ("prefill", "decode")
    step: int | None = None
    layer_capacity: float | None = None

    @property
    def share_memory(self) -> bool:
        """Whether a session should plan which results share memory: not in a graph of all hops and layers."""
        return self.layer_capacity is None

    @property
    def only_decodes(self) -> bool:
        """Whether every row has one token."""
        return self.serves == ("decode",)
