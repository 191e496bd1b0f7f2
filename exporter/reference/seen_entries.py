"""Stands in for transformers' cache in the PyTorch reference: it says which keys and values tokens attend to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference.layer_calls import Call
from dynexport.exporter.reference.transformers_layers import DecoderLayers

IntArray = NDArray[np.int64]
# The number of the call of a token that ran alone.
ALONE = -1


class SeenEntries(ABC):
    """Stands in for transformers' cache: it says which keys and values tokens attend to.

    Args:
        calls: for every row int64 [tokens], the number of the call that each token ran in, or ``ALONE`` for one that
            attends to stored entries only.
    """

    def __init__(self, calls: Sequence[IntArray]) -> None:
        self._calls = calls

    def shown(self, decoder: DecoderLayers, call: Call, row: int, tokens: Any, place: int | None) -> Call:
        """Return a layer's arguments for tokens of a row, int64 [n], in which it takes keys and values from here.

        There are two of each: the token's own, for those that it ran together with, and the stored ones. ``place`` is
        that of the cache, if it is not the layer's number.
        """
        import torch

        each, calls = torch.arange(len(tokens)), torch.from_numpy(self._calls[row])[tokens]
        twice = decoder.pick(call, 0, 1, each, each.repeat(2))
        together = (calls[:, None] == calls) & (calls != ALONE)
        mask = decoder.mask(twice)
        # A token sees itself: boolean masks are true where a token is seen, those of MPT where it is not.
        unseen = ~mask[..., 0, 0].any() if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = mask.masked_fill(~torch.cat([together, ~together], dim=1), unseen)
        return decoder.with_cache(decoder.with_mask(twice, mask), _Shown(self, row, place))

    @abstractmethod
    def stored(self, layer: int, row: int, keys: Any, values: Any) -> tuple[Any, Any]:
        """Return what the cache holds for keys and values [1, kv_heads, tokens, head_dim] of a row, in their shapes."""


@dataclass(frozen=True)
class _Shown:
    """The cache that a layer gets for tokens of one row."""

    entries: SeenEntries
    row: int
    place: int | None

    def get_seq_length(self, *_: Any) -> int:
        """Return 0, the number of tokens before those of the call."""
        return 0

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Take new keys and values [1, kv_heads, tokens, head_dim] and return those to attend to, twice as many."""
        import torch

        stored = self.entries.stored(layer if self.place is None else self.place, self.row, keys, values)
        first, second = (torch.cat(pair, dim=2) for pair in zip((keys, values), stored, strict=True))
        return first, second


__all__ = ["ALONE", "IntArray", "SeenEntries"]
