"""Plans of a bundle's graphs: the layers, sizes and purpose of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dynexport.runtime.bundle.manifest import ProfileName

# Largest chunk of a graph that writes a slot of every routed cache for each token, chosen or not.
PADDED_CHUNK = 64
# Meaning of a symbol in the shapes of a graph's inputs: batch rows, new tokens per row, or logits per row. Where the
# tokens of all rows are concatenated (ragged): all tokens (line), or all tokens with logits (line_of_logits).
Dimension = Literal["rows", "tokens", "logits", "line", "line_of_logits"]
STEP_DIMENSIONS: Mapping[str, Dimension] = {"B": "rows", "S": "tokens", "K": "logits"}


@dataclass(frozen=True)
class SlotRule:
    """The capacity of one cache, in entries and slots per row; the fields are those of ``manifest.Cache``."""

    most: int | None = None
    per_token: int = 1
    slack: int = 0


@dataclass(frozen=True)
class PartPlan:
    """The plan of one part of a file, of which a call runs one; the manifest lists every part as a graph.

    Attributes:
        name: name in the manifest.
        number: the value of the file's input ``part``.
        layers: numbers of the layers in the part.
        inputs: the inputs that it takes, of those that the file has; one with a dot at the end stands for all names
            that begin so.
        outputs: the outputs that it makes, likewise.
        sizes: symbols in the shapes of the file's inputs and outputs, and what they are for this part.
    """

    name: str
    number: int
    layers: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: Mapping[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphPlan:
    """The plan of one graph of a bundle; a strategy may subclass it.

    Attributes:
        name: file stem and name in the manifest.
        layers: numbers of the layers in the graph.
        conditional: whether the graph has a ``layer_active`` input that selects the layers to run.
        contiguous: layers that no token skips, so that their caches hold the positions 0, 1, 2, ..
        together: groups of layers that are always skipped together, so that their caches have equal lengths.
        serves: prefill, decode or both. A graph for decode only takes one token per row.
        dimensions: the symbols in the shapes of the graph's inputs, and what each counts.
        chunk: most tokens per row in one call; None: no limit.
        share_memory: whether a session should plan memory reuse between results, as in ``manifest.Graph``.
        whole_prompts: whether a prompt is never cut into chunks, so that one call may return all its logits.
        parts: the parts of a file of which a call runs one; empty for a file that is one graph.
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
    parts: tuple[PartPlan, ...] = ()

    @property
    def only_decodes(self) -> bool:
        """Return whether the graph serves decode steps only, with one token per row."""
        return self.serves == ("decode",)
