"""K/V entries of a pool in PyTorch: what layers make, and what they are shown instead of transformers' cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynexport.exporter.reference.rows import IntArray
from dynexport.exporter.reference.transformers_layers import tested_version
from dynexport.runtime.bundle.errors import DynexportError


@dataclass
class Entries:
    """K/V entries that belong together, in the order they were made.

    Attributes:
        positions: int64 [entries], original positions of the tokens that made them.
        keys, values: float32 [1, heads, entries, head size]; None as long as there are none.
    """

    positions: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    keys: Any = None
    values: Any = None

    def add(self, positions: IntArray, keys: Any, values: Any) -> None:
        """Put new ones behind them."""
        import torch

        self.positions = np.concatenate([self.positions, positions])
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=2)


class ShownEntries:
    """Takes the place of transformers' cache for one call of one layer."""

    def __init__(self, shown: tuple[Any, Any] | None = None) -> None:
        """``shown``: keys and values [rows, heads, entries, head size] to attend to; None: those that it makes."""
        self._shown = shown
        self._made: tuple[Any, Any] | None = None

    @property
    def made(self) -> tuple[Any, Any]:
        """The keys and values [rows, heads, tokens, head size] that the layer made, rotary applied.

        Raises:
            DynexportError: when the layer has not asked for any.
        """
        if self._made is None:
            raise DynexportError(
                "radial: expected layers that pass new keys and values to a cache, found ones that do not; "
                f"{tested_version()}"
            )
        return self._made

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
        """What an attention module calls with its new keys and values: those that it shall attend to."""
        self._made = keys, values
        return self._shown or self._made


__all__ = ["Entries", "ShownEntries"]
