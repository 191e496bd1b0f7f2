"""The float16 KV caches of a bundle, for the PyTorch reference: a token attends to stored values, also to its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.seen_entries import ALONE, SeenEntries
from dynexport.runtime.bundle.errors import DynexportError

HalfArray = NDArray[np.float16]


class HalfEntries(SeenEntries):
    """Entries that are rounded here.

    Args:
        lengths: number of tokens of every row.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__([np.full(length, ALONE) for length in lengths])

    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        return keys.half().float(), values.half().float()


class GivenHalves(HalfEntries):
    """Entries that an engine has stored, so that no rounding can flip; the reference's own are compared with them.

    Args:
        lengths: number of tokens of every row.
        rows: for every row of the coming pass, the entries of every place: float16 [kv_heads, entries, cache_head_dim].

    Attributes:
        furthest: per place, by how much a key or value is further from its entry than half of a float16 step, as a
            share of the largest of its call.
    """

    def __init__(self, lengths: Sequence[int], rows: Sequence[Mapping[int, tuple[HalfArray, HalfArray]]]) -> None:
        super().__init__(lengths)
        self._rows = rows
        self.furthest = dict.fromkeys(rows[0], 0.0)

    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Return the entries of a row, and compare its keys and values with them.

        Raises:
            DynexportError: when the engine has stored another number of entries.
        """
        import torch

        shown = []
        for own, entries in zip((keys, values), self._rows[row][layer], strict=True):
            kept = entries[None, :, :, : own.shape[-1]]
            if kept.shape != own.shape:
                raise DynexportError(
                    f"layer {layer}: expected {own.shape[2]} entries in the cache, found {kept.shape[2]}"
                )
            values_of = torch.from_numpy(kept.astype(np.float32))
            half_a_step = torch.from_numpy(np.spacing(np.abs(kept)).astype(np.float32)) / 2
            beyond = ((own - values_of).abs() - half_a_step).max() / own.abs().max()
            self.furthest[layer] = max(self.furthest[layer], float(beyond))
            shown.append(values_of)
        return shown[0], shown[1]


__all__ = ["GivenHalves", "HalfArray", "HalfEntries"]
