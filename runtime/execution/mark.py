"""Parts of a row: a mark of its end, for truncation and copies of a prefix; entries saved outside the cache."""

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


@dataclass(frozen=True)
class Saved:
    """Entries of some consecutive tokens of a row, copied out of its cache.

    Attributes:
        entries: "{place}.{part}" -> [heads, n, size] or [n].
        lengths: int64 [places], number of the row's entries before them.
        added: int64 [places], number of these entries.
        first: the position of the first token.
        last: the position after the last token.
    """

    entries: dict[str, Array]
    lengths: Array
    added: Array
    first: int
    last: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.last - self.first

    @property
    def bytes(self) -> int:
        """Memory of the entries, in bytes."""
        return sum(values.nbytes for values in self.entries.values())


__all__ = ["Mark", "Saved"]
