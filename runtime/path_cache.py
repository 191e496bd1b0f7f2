"""The K/V caches of a Radial Network: one for every step, or one for every layer of the pool, as the contract says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dynexport.runtime.contract import Radial
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Manifest
from dynexport.runtime.routes import RowLog

Array = np.ndarray
_PAST = "past_key_values."


class PathCache:
    """Caches for ``rows`` sequences of up to ``slots`` tokens.

    A place is a step or a layer. A layer that tokens come back to has more entries than tokens: its buffers grow.

    Attributes:
        buffers: per place: "key" and "value" float32 [rows, kv_heads, slots, head_dim]; "position" int64 [rows, slots]
            where original positions are needed; "step" int64 [rows, slots] where a place is a layer.
        lengths: int64 [places, rows], entries in use.
        positions: int64 [rows], tokens seen: the next token's original position.
        overflow: int64 [0, rows]: no token finds a place full.
        logs: what became of every token, per row; None where nobody wants to know.

    Args:
        record: keep logs.
    """

    def __init__(self, manifest: Manifest, contract: Radial, rows: int, slots: int, *, record: bool = False) -> None:
        model = manifest.model
        self.slots = slots
        places = model.layers if contract.cache_policy == "layer" else contract.max_steps
        self._shape = (rows, model.kv_heads, slots, model.head_dim)
        (graph,) = (graph for graph in manifest.graphs if graph.role == "attention")
        names = (spec.name for spec in graph.inputs if spec.name.startswith(_PAST))
        parts = [name.removeprefix(_PAST) for name in names]
        try:
            self.buffers = [{part: self._empty(part, slots) for part in parts} for _ in range(places)]
        except (MemoryError, ValueError) as error:  # the second where the size overflows
            size = 8 * places * rows * model.kv_heads * slots * model.head_dim
            raise DynexportError(
                f"cache: {rows} rows of {slots} tokens need {size / 2**30:.1f} GiB, more than there is; "
                "lower the batch or the number of tokens"
            ) from error
        self.lengths = np.zeros((places, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)
        self.overflow = np.zeros((0, rows), np.int64)
        self.logs = [RowLog() for _ in range(rows)] if record else None

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.positions)

    def room(self, place: int, needed: int) -> dict[str, Array]:
        """The buffers of a place with at least so many slots; larger ones where there were fewer."""
        slots = self.buffers[place]["key"].shape[2]
        if needed > slots:
            grown = {part: self._empty(part, max(needed, 2 * slots)) for part in self.buffers[place]}
            for part, buffer in self.buffers[place].items():
                grown[part][(slice(None),) * (buffer.ndim - 2 if buffer.ndim == 4 else 1) + (slice(slots),)] = buffer
            self.buffers[place] = grown
        return self.buffers[place]

    def rewind(self) -> None:
        """Forget every entry; the memory stays."""
        self.lengths[:] = 0
        self.positions[:] = 0
        for log in self.logs or ():
            log.clear()

    def mark(self) -> tuple[Array, ...]:
        """How much is in use now, for ``restore``."""
        return self.lengths.copy(), self.positions.copy()

    def restore(self, mark: tuple[Array, ...]) -> None:
        """Forget what came after a mark; logs keep it."""
        self.lengths[:], self.positions[:] = mark

    @contextmanager
    def as_it_was_on_error(self) -> Iterator[None]:
        """Within, entries come step by step: when one fails, or is interrupted, none of them counts."""
        mark = self.mark()
        try:
            yield
        except BaseException:
            self.restore(mark)
            raise

    def _empty(self, part: str, slots: int) -> Array:
        rows, kv_heads, _, size = self._shape
        if part in ("key", "value"):
            return np.zeros((rows, kv_heads, slots, size), np.float32)
        return np.zeros((rows, slots), np.int64)
