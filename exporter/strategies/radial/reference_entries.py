"""KV entries of a pool in PyTorch, and the cache object that shows them to transformers' attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynexport.exporter.reference.rows import IntArray
from dynexport.exporter.reference.transformers_layers import tested_version
from dynexport.runtime.bundle.errors import DynexportError


@dataclass
class Entries:
    """The KV entries of one cache, in the order of their creation.

    Attributes:
        positions: int64 [entries], original positions of their tokens.
        keys: float32 [1, heads, entries, head size]; None without entries.
        values: float32 [1, heads, entries, head size]; None without entries.
    """

    positions: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: Any = None
    values: Any = None

    def add(self, positions: IntArray, keys: Any, values: Any) -> None:
        """Append entries."""
        import torch

        self.positions = np.concatenate([self.positions, positions])
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)


class ShownEntries:
    """A replacement of transformers' cache for one call of one layer."""

    def __init__(self, shown: tuple[Any, Any] | None = None) -> None:
        """Show keys and values [rows, heads, entries, head size] to attention; None shows the call's own."""
        self._shown = shown
        self._made: tuple[Any, Any] | None = None

    @property
    def made(self) -> tuple[Any, Any]:
        """The keys and values [rows, heads, tokens, head size] of the call, with rotary positions applied.

        Raises:
            DynexportError: when the layer did not pass any to the cache.
        """
        if self._made is None:
            raise DynexportError(
                "radial: expected layers that pass new keys and values to a cache, found ones that do not; "
                f"{tested_version()}"
            )
        return self._made

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Take an attention module's new keys and values and return those to attend to."""
        self._made = keys, values
        return self._shown or self._made


__all__ = ["Entries", "ShownEntries"]
