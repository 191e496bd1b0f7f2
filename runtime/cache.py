"""The K/V caches of a batch: preallocated once, written in place, with a length per layer and row."""

from __future__ import annotations

import math

import numpy as np

from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Manifest


class Cache:
    """Caches for ``rows`` sequences of up to ``slots`` tokens.

    Attributes:
        buffers: "{layer}.key" and "{layer}.value" float32 [rows, kv_heads, slots, head_dim]; "{layer}.position"
            int64 [rows, slots] for layers that need the original positions.
        lengths: int64 [layers, rows], entries in use.
        positions: int64 [rows], tokens seen: the next token's original position.
    """

    def __init__(self, manifest: Manifest, rows: int, slots: int) -> None:
        model = manifest.model
        self.slots = slots
        shape = (rows, model.kv_heads, slots, model.head_dim)
        try:
            self.buffers = {
                f"{layer}.{part}": np.zeros(shape, np.float32)
                for layer in range(model.layers)
                for part in ("key", "value")
            }
        except (MemoryError, ValueError) as error:  # the second where the size overflows
            size = 2 * model.layers * 4 * math.prod(shape)
            raise DynexportError(
                f"cache: {rows} rows of {slots} tokens need {size / 2**30:.1f} GiB, more than there is; "
                "lower the batch or the number of tokens"
            ) from error
        for layer in manifest.key_positions:
            self.buffers[f"{layer}.position"] = np.zeros((rows, slots), np.int64)
        self.lengths = np.zeros((model.layers, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.positions)

    def row(self, index: int) -> Cache:
        """A view of one row: the same memory, so what is written there is written here."""
        view = object.__new__(Cache)
        view.slots = self.slots
        view.buffers = {name: buffer[index : index + 1] for name, buffer in self.buffers.items()}
        view.lengths = self.lengths[:, index : index + 1]
        view.positions = self.positions[index : index + 1]
        return view

    def rewind(self) -> None:
        """Forget every entry; the memory stays."""
        self.lengths[:] = 0
        self.positions[:] = 0
