"""The memory of the KV caches of some rows: allocate it, grow it, and copy entries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.engines.engine import Backend, Buffers

Array = np.ndarray


class CacheMemory:
    """The buffers of all places for a fixed number of rows.

    Attributes:
        buffers: "{place}.{part}" -> [rows, heads, slots, size] or [rows, slots]. Growing makes a new dictionary,
            because engines bind the buffers of a dictionary once.
        slots: number of slots per row of every place.

    Args:
        layout: the shapes of the bundle's caches.
        backend: allocates the memory.
        rows: number of rows.
        tokens: capacity of a row in tokens.
        room: tokens per row to allocate memory for now; None allocates for all.

    Raises:
        DynexportError: for too little memory.
    """

    def __init__(self, layout: CacheLayout, backend: Backend, rows: int, tokens: int, room: int | None) -> None:
        self._layout, self._backend, self._rows, self._tokens = layout, backend, rows, tokens
        self._room = tokens if room is None or not backend.grows else min(tokens, room)
        self.slots = self._slots_for(self._room)
        self.buffers = Buffers()
        for place, count in enumerate(self.slots):
            self.buffers |= self._allocated(place, count)

    def reserve(self, tokens: int, used: Sequence[int]) -> None:
        """Grow the buffers to hold ``tokens`` tokens per row, or the capacity if that is less.

        Args:
            tokens: number of tokens per row.
            used: the largest number of entries of a row in every place; these are kept.

        Raises:
            DynexportError: for too little memory; nothing has changed then.
        """
        if min(tokens, self._tokens) <= self._room:
            return
        room = min(self._tokens, max(tokens, 2 * self._room))
        slots, grown = self._slots_for(room), Buffers()
        for place, count in enumerate(slots):
            for name, larger in self._allocated(place, count).items():
                kept = _entries(larger, 0, used[place])
                larger[kept] = self.buffers[name][kept]
                grown[name] = larger
        self.buffers, self.slots, self._room = grown, slots, room

    def copy_row(self, row: int, target: int, entries: Sequence[int]) -> None:
        """Copy a row's first entries of every place to another row."""
        for place, count in enumerate(entries):
            for part in self._layout.caches[place].parts:
                self._backend.copy_row(self.buffers[f"{place}.{part}"], row, target, int(count))

    def read(self, row: int, first: Sequence[int], last: Sequence[int]) -> dict[str, Array]:
        """Return copies of a row's entries ``first`` to ``last`` (exclusive) of every place, by the buffer's name."""
        found = {}
        for place in range(self._layout.places):
            for part in self._layout.caches[place].parts:
                buffer = self.buffers[f"{place}.{part}"][row]
                found[f"{place}.{part}"] = buffer[_entries(buffer, first[place], last[place])].copy()
        return found

    def write(self, row: int, first: Sequence[int], entries: dict[str, Array]) -> None:
        """Write what ``read`` returned into a row, at the entries ``first`` and after."""
        for name, values in entries.items():
            start = first[int(name.partition(".")[0])]
            buffer = self.buffers[name][row]
            count = values.shape[1] if values.ndim == 3 else values.shape[0]
            buffer[_entries(buffer, start, start + count)] = values

    def _slots_for(self, tokens: int) -> list[int]:
        return [self._layout.slots(place, tokens) for place in range(self._layout.places)]

    def _allocated(self, place: int, slots: int) -> dict[str, Array]:
        parts = self._layout.caches[place].parts
        shapes = self._layout.shapes(place, self._rows, slots)
        try:
            return {
                f"{place}.{name}": self._backend.allocate(shape, parts[name].array_type)
                for name, shape in shapes.items()
            }
        except (MemoryError, ValueError) as error:  # the second where the size overflows
            size = self._layout.places * sum(math.prod(shape) * 4 for shape in shapes.values())
            raise DynexportError(
                f"cache: {self._rows} rows of {self._tokens} tokens need {size / 2**30:.1f} GiB, more than there is; "
                "lower the batch or the number of tokens"
            ) from error


def _entries(buffer: Array, first: int, last: int) -> tuple[slice, ...]:
    """Return the index of some entries in a buffer [.., heads, slots, size] or [.., slots], with or without rows."""
    return (..., slice(first, last), slice(None)) if buffer.ndim >= 3 else (..., slice(first, last))  # type: ignore[return-value]


__all__ = ["CacheMemory"]
