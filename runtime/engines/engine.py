"""What a decoder asks of an engine, whatever runs the graph."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dynexport.runtime.bundle.manifest import Graph

Array = np.ndarray


@dataclass(frozen=True)
class Caches:
    """Caches that a graph reads and writes in place.

    Attributes:
        buffers: by name, "past_key_values." and "present." left out; others come in another dict.
        rows: those of them that the step is for; None for all.
        place: what they belong to: for each place an engine keeps its last binding.
    """

    buffers: Mapping[str, Array]
    rows: slice | None = None
    place: Hashable = None

    def views(self) -> dict[str, Array]:
        """Its rows of every buffer, contiguous."""
        return {name: buffer if self.rows is None else buffer[self.rows] for name, buffer in self.buffers.items()}

    def same(self, other: Caches) -> bool:
        """Whether another one is the same memory."""
        return self.buffers is other.buffers and self.rows == other.rows


NO_CACHES = Caches({})


class Engine(Protocol):
    """A graph, ready to run; by several threads at once, where each has caches of its own and results are lasting.

    Attributes:
        graph: its entry in the manifest.
    """

    graph: Graph

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """One step; caches are read and written in place.

        Args:
            inputs: arrays by name, as the manifest describes them; those that the graph lacks are left out, and of what
                has a row for each layer of the model it takes the rows of its own layers.
            lasting: whether results are arrays of their own; or memory that the next run writes over, whatever thread
                it is of.

        Returns:
            All outputs but the caches, by name.

        Raises:
            DynexportError: when the engine fails.
        """

    def end_profiling(self) -> Path:
        """Write the profile, where the engine was opened with one; its path."""


__all__ = ["NO_CACHES", "Caches", "Engine"]
