"""Which graphs a bundle has, and what each is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dynexport.runtime.bundle.manifest import ProfileName

# Tokens of a row in a run that fills slots whatever was chosen: each costs a slot of every cache that tokens choose.
PADDED_CHUNK = 64
# What a symbol in the shapes of a graph's inputs counts: rows of the batch, new tokens of a row, tokens of a row whose
# logits are wanted; and where tokens of all rows come in one line, those, or those whose logits are wanted.
Dimension = Literal["rows", "tokens", "logits", "line", "line_of_logits"]
STEP_DIMENSIONS: Mapping[str, Dimension] = {"B": "rows", "S": "tokens", "K": "logits"}


@dataclass(frozen=True)
class SlotRule:
    """How many entries a row may have in one cache, and slots; as in ``manifest.Cache``."""

    most: int | None = None
    per_token: int = 1
    slack: int = 0


@dataclass(frozen=True)
class GraphPlan:
    """One graph of a bundle; a strategy may have plans of its own that say more.

    Attributes:
        name: file stem and name in the manifest.
        layers: the layers that it holds.
        conditional: whether it has a ``layer_active`` input that says which of them run.
        contiguous: those whose caches always hold the positions 0, 1, 2, .., as nothing ever skips them.
        together: groups of layers that are only ever skipped together, so that their caches have the same lengths.
        serves: what it is run for. A graph that only decodes takes one token of every row.
        dimensions: the symbols in the shapes of its inputs, and what each counts.
        chunk: the most tokens of a row that a run takes; None for any number.
        share_memory: whether a session should plan which results share memory, as in ``manifest.Graph``.
        whole_prompts: whether a prompt is never cut, so that a run of one may have to give all its logits.
    """

    name: str
    layers: tuple[int, ...]
    conditional: bool = False
    contiguous: tuple[int, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()
    serves: tuple[ProfileName, ...] = ("prefill", "decode")
    dimensions: Mapping[str, Dimension] = field(default_factory=lambda: STEP_DIMENSIONS)
    chunk: int | None = None
    share_memory: bool = True
    whole_prompts: bool = False

    @property
    def only_decodes(self) -> bool:
        """Whether every row has one token."""
        return self.serves == ("decode",)
