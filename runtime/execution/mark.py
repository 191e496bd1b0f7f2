"""A mark of a row's state, for truncation and for copies of a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Mark:
    """A point in a row that the row can be truncated to.

    Attributes:
        row: the row's number in the cache.
        tenant: a number, unique in the process, of the text that the row held; a mark is valid for that text only.
        lengths: int64 [places], number of entries.
        position: number of tokens seen.
        overflow: int64 [counters], number of tokens that found a layer or its cache full.
        steps: number of calls in the row's log.
        made: the cache's count of truncations when the mark was made; a later truncation below ``position`` makes the
            mark invalid.
    """

    row: int
    tenant: int
    lengths: Array
    position: int
    overflow: Array
    steps: int
    made: int = 0


__all__ = ["Mark"]
