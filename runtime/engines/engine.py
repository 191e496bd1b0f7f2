"""The interfaces of engines: an Engine runs one graph, a Backend opens the engines of a bundle."""

from __future__ import annotations

import math
import mmap
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from dynexport.runtime.bundle.manifest import Graph

Array = np.ndarray
# Bytes from which NumPy asks for huge pages.
_LARGE = 4 << 20


# The buffers of all caches, by name "{place}.{part}"; each is [rows, ..].
Buffers: TypeAlias = dict[str, Array]


@dataclass(frozen=True)
class Caches:
    """The KV caches that one call reads and writes in place.

    Attributes:
        buffers: buffers [rows, ..] by name "{place}.{part}". Engines keep bindings for this dict object: reallocated
            buffers need a new dict.
        rows: the contiguous rows that the call is for.
        place: the place for a graph that works on one cache per call; None if the graph's input names give the places.
    """

    buffers: Mapping[str, Array]
    rows: slice
    place: int | None = None

    @property
    def key(self) -> Hashable:
        """A key that identifies the rows and place among calls with the same buffers."""
        return self.rows.start, self.rows.stop, self.place

    def views(self, names: Iterable[str]) -> dict[str, Array]:
        """Return contiguous views of the call's rows, of the buffers with the names that a graph uses."""
        prefix = "" if self.place is None else f"{self.place}."
        return {name: self.buffers[prefix + name][self.rows] for name in names}


NO_CACHES = Caches({}, slice(0, 0))


class Prepared(Protocol):
    """A call with bound inputs, caches and results, to be run many times.

    Attributes:
        inputs: arrays by name that the run reads; write new values into them.
    """

    inputs: dict[str, Array]

    def move(self, place: int) -> None:
        """Take the cache of another place from the next run on; for a graph that takes one of any place."""

    def run(self) -> dict[str, Array]:
        """Run and return all outputs except caches; the next run overwrites them. Errors as for ``Engine.run``."""


class Engine(Protocol):
    """A loaded graph. Threads may run it at once if each has its own caches and ``lasting`` is true.

    Attributes:
        graph: the graph's entry in the manifest.
    """

    graph: Graph

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """Run the graph once; caches are read and written in place.

        Args:
            inputs: arrays by name for the graph's inputs in the manifest, except caches; other names are ignored.
            caches: the KV caches of this call.
            lasting: whether results are copies. If false, the next run, of any thread, overwrites them.

        Returns:
            All outputs by name, except caches.

        Raises:
            DynexportError: when the engine fails.
        """

    def prepare(self, inputs: Mapping[str, Array], caches: Caches, *, shared: bool = False) -> Prepared | None:
        """Return a call bound to these input shapes and caches, for one thread; None if the engine cannot bind.

        With ``shared`` it reads these very arrays, contiguous and of the graph's types, which other calls may read too.
        """

    def end_profiling(self) -> Path:
        """Write the profiler's file and return its path; the engine must have been opened for profiling."""


class Backend(Protocol):
    """The engine library for a bundle; it opens engines and allocates the memory that they share.

    Attributes:
        grows: whether caches may be moved to larger buffers while they are in use.
    """

    grows: bool

    def open(self, graph: Graph) -> Engine:
        """Load a graph. Raises DynexportError when it cannot run on this backend."""

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return zeroed memory for a buffer, or a host array that stands for zeroed device memory."""

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy the first entries of a row to row ``target``, in [rows, heads, slots, size] or [rows, slots]."""


class HostMemory:
    """Allocation of caches in host memory."""

    def allocate(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return zeros; with lazy paging, the system commits only pages that are written.

        NumPy asks Linux for huge pages. In a long context, where a head's entries span 2 MiB, the first token would
        then commit all of a row, so large buffers are mapped without them.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size < _LARGE or not hasattr(mmap, "MADV_NOHUGEPAGE"):
            return np.zeros(shape, dtype)
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise MemoryError(f"{size} bytes") from error
        with suppress(OSError):  # a kernel that has no huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        return np.frombuffer(memory, dtype).reshape(shape)

    def copy_row(self, buffer: Array, row: int, target: int, entries: int) -> None:
        """Copy the first entries of a row to row ``target``."""
        first = (..., slice(entries), slice(None)) if buffer.ndim == 4 else (..., slice(entries))
        buffer[target][first] = buffer[row][first]


__all__ = ["NO_CACHES", "Backend", "Buffers", "Caches", "Engine", "HostMemory", "Prepared"]
