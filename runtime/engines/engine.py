"""What runs a graph, as the rest of the runtime sees it: an engine a graph, a backend for all of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from dynexport.runtime.bundle.manifest import Graph

Array = np.ndarray


# The buffers of all caches, "{place}.{part}" [rows, ..].
Buffers: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Caches:
    """Caches that a graph reads and writes in place.

    Attributes:
        buffers: "{place}.{part}" [rows, ..]; other memory comes in another dict.
        rows: those of them that the call is for, contiguous.
        place: of a graph that takes one cache at a time: which one. None: the graph's names say which.
    """

    buffers: Mapping[str, Array]
    rows: slice
    place: int | None = None

    @property
    def key(self) -> Hashable:
        """What tells one call's caches from another's, of the same buffers."""
        return self.rows.start, self.rows.stop, self.place

    def views(self, names: Iterable[str]) -> dict[str, Array]:
        """Return the call's rows of the buffers that a graph names, contiguous."""
        prefix = "" if self.place is None else f"{self.place}."
        return {name: self.buffers[prefix + name][self.rows] for name in names}


NO_CACHES = Caches({}, slice(0, 0))


class Prepared(Protocol):
    """A run whose inputs, caches and results are bound.

    Attributes:
        inputs: by name, the memory that the run reads; write values there.
    """

    inputs: dict[str, Array]

    def run(self) -> dict[str, Array]:
        """Run it: all outputs but the caches, in memory that the next run writes over. Errors as for ``Engine``."""


class Engine(Protocol):
    """A graph, ready to run; by several threads at once, where each has caches of its own and results are lasting.

    Attributes:
        graph: its entry in the manifest.
    """

    graph: Graph

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """One step; caches are read and written in place.

        Args:
            inputs: arrays by name, as the manifest describes the graph's, caches left out; what else there is, is not
                looked at.
            lasting: whether results are arrays of their own; or memory that the next run writes over, whatever thread
                it is of.

        Returns:
            All outputs but the caches, by name.

        Raises:
            DynexportError: when the engine fails.
        """

    def prepare(self, inputs: Mapping[str, Array], caches: Caches) -> Prepared | None:
        """Bind inputs of these shapes and caches for many runs of one user; None where the engine cannot."""

    def end_profiling(self) -> Path:
        """Write the profile, where the engine was opened with one; its path."""


class Backend(Protocol):
    """What runs graphs, and owns the memory that they share.

    Attributes:
        grows: whether caches may be put into larger memory while they are in use.
    """

    grows: bool

    def open(self, graph: Graph) -> Engine:
        """Load a graph. Raises DynexportError for one that cannot run there."""

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return zeroed memory for a buffer; a handle where the memory is a device's."""

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy the first entries of a row to another one, in a buffer [rows, heads, slots, size] or [rows, slots]."""


class HostMemory:
    """Caches in the memory of the host."""

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return zeros; memory that is never written is never taken, where the system gives it page by page."""
        return np.zeros(shape, dtype)

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy the first entries of a row to another one."""
        first = (..., slice(entries), slice(None)) if buffer.ndim == 4 else (..., slice(entries))
        buffer[target][first] = buffer[row][first]


__all__ = ["NO_CACHES", "Backend", "Buffers", "Caches", "Engine", "HostMemory", "Prepared"]
