"""The K/V caches of a Radial Network: one for every step, or one for every layer of the pool, as the contract says."""

from __future__ import annotations

import numpy as np

from dynexport.runtime.cache import Entries, too_large
from dynexport.runtime.contract import Radial
from dynexport.runtime.manifest import Manifest
from dynexport.runtime.routes import RowLog

Array = np.ndarray
_PAST = "past_key_values."


class PathCache(Entries):
    """Caches for ``rows`` sequences of up to ``slots`` tokens.

    A place is a step or a layer. A layer that tokens come back to has more entries than tokens: its buffers grow.

    Attributes:
        buffers: per place: "key" and "value" float32 [rows, kv_heads, slots, head_dim]; "position" int64 [rows, slots]
            where original positions are needed; "step" int64 [rows, slots] where a place is a layer.

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
            raise too_large(rows, slots, size) from error
        self.lengths = np.zeros((places, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)
        self.overflow = np.zeros((0, rows), np.int64)  # no token finds a place full
        self.logs = [RowLog() for _ in range(rows)] if record else None

    def room(self, place: int, needed: int) -> dict[str, Array]:
        """The buffers of a place with at least so many slots; larger ones where there were fewer."""
        slots = self.buffers[place]["key"].shape[2]
        if needed > slots:
            grown = {part: self._empty(part, max(needed, 2 * slots)) for part in self.buffers[place]}
            for part, buffer in self.buffers[place].items():
                entries = grown[part][:, :, :slots] if buffer.ndim == 4 else grown[part][:, :slots]
                entries[:] = buffer
            self.buffers[place] = grown
        return self.buffers[place]

    def _empty(self, part: str, slots: int) -> Array:
        rows, kv_heads, _, size = self._shape
        if part in ("key", "value"):
            return np.zeros((rows, kv_heads, slots, size), np.float32)
        return np.zeros((rows, slots), np.int64)
