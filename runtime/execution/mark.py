"""Parts of a row: a mark of its end, for truncation and copies of a prefix; entries saved outside the cache."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError

Array = np.ndarray
_TENANTS = itertools.count()


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
    def size(self) -> int:
        """Memory of the entries, in bytes."""
        return sum(values.nbytes for values in self.entries.values())


class Texts:
    """The text that each row holds and its truncations, to tell which marks are valid.

    Attributes:
        truncations: number of truncations of all rows.

    Args:
        rows: number of rows.
    """

    def __init__(self, rows: int) -> None:
        self.truncations = 0
        self._tenants = [next(_TENANTS) for _ in range(rows)]
        # Per row (truncation number, tokens left); a truncation to fewer tokens replaces earlier ones.
        self._cuts: list[list[tuple[int, int]]] = [[] for _ in range(rows)]

    def tenant(self, row: int) -> int:
        """Return the number of a row's text."""
        return self._tenants[row]

    def renew(self, row: int) -> None:
        """Begin another text in a row."""
        self._tenants[row] = next(_TENANTS)
        self._cuts[row] = []

    def truncate(self, row: int, tokens: int) -> None:
        """Record that a row was truncated to some tokens."""
        self.truncations += 1
        self._cuts[row] = [cut for cut in self._cuts[row] if cut[1] < tokens] + [(self.truncations, tokens)]

    def check(self, mark: Mark, position: int) -> None:
        """Check a mark of a row that holds ``position`` tokens.

        Raises:
            DynexportError: for a mark of an earlier text, or one beyond a truncation.
        """
        if mark.tenant != self._tenants[mark.row]:
            raise DynexportError(f"cache: row {mark.row}: expected a mark of this text, found one of an earlier text")
        if any(mark.made < made and mark.position > tokens for made, tokens in self._cuts[mark.row]):
            raise DynexportError(
                f"cache: row {mark.row}: expected a mark within its {position} tokens, found one after "
                f"{mark.position}; the row was truncated since"
            )


__all__ = ["Mark", "Saved", "Texts"]
