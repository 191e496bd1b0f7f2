"""The KV caches of a batch's rows: the only owner of how much of them is in use."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.engines.engine import Backend, Buffers
from dynexport.runtime.execution.claim import Claim
from dynexport.runtime.execution.decisions import Decisions

Array = np.ndarray
# Tokens that rows of a long context have room for at first, where nobody knows how many there will be.
STEP = 1024
_TENANTS = itertools.count()


@dataclass(frozen=True)
class Mark:
    """How much of a row was in use.

    Attributes:
        row: of the cache.
        tenant: who has the row, of all caches' rows; a mark of an earlier one is none of this one.
        lengths: int64 [places], entries.
        position: tokens seen.
        overflow: int64 [counters].
        steps: pieces of its log.
        made: when, as the cache counts cuts: what was cut off since is no part of the row any more.
    """

    row: int
    tenant: int
    lengths: Array
    position: int
    overflow: Array
    steps: int
    made: int = 0


class KvCache:
    """Caches for some rows of up to some tokens each.

    A row is acquired, filled by an ``Executor``, cut back to a mark if need be, and released. Buffers may have room for
    fewer tokens as yet: they grow when more come.

    Attributes:
        manifest: what it is a cache of.
        tokens: that a row may have.
        lengths: int64 [places, rows], entries in use; for reading.
        positions: int64 [rows], tokens seen: the next token's original position; for reading.
        overflow: int64 [counters, rows], tokens that found a layer or its cache full; for reading.
        buffers: "{place}.{part}" [rows, ..].
        logs: per row the decisions of every call; None unless they are recorded.
        streamed, running: held by the stream, and by the run, that uses it.

    Args:
        backend: gives the memory.
        counters: rows of ``overflow``.
        record: keep logs.
        room: tokens that rows have room for at first; None for all.

    Raises:
        DynexportError: for sizes that are none, more rows than engines are built for, or too little memory.
    """

    def __init__(
        self,
        manifest: Manifest,
        layout: CacheLayout,
        backend: Backend,
        rows: int,
        tokens: int,
        *,
        counters: int,
        record: bool = False,
        room: int | None = None,
    ) -> None:
        checked_kind("manifest", manifest, Manifest, "a Manifest")
        checked_count("rows", rows)
        limit = manifest.limits.rows
        if limit is not None and rows > limit:
            raise DynexportError(
                f"batch: expected at most {limit} rows, which the bundle's engines are for, found {rows}; convert it "
                f"again with --max-batch {rows}"
            )
        self.manifest, self.tokens = manifest, min(checked_count("slots", tokens), manifest.model.max_length)
        self._layout, self._backend = layout, backend
        self._room = self.tokens if room is None or not backend.grows else min(self.tokens, room)
        self._rows = rows
        self._slots = [layout.slots(place, self._room) for place in range(layout.places)]
        self.buffers = Buffers()
        for place, slots in enumerate(self._slots):
            self.buffers |= self._allocated(place, slots)
        self.lengths = np.zeros((layout.places, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)
        self.overflow = np.zeros((counters, rows), np.int64)
        self.logs: list[list[Decisions]] | None = [[] for _ in range(rows)] if record else None
        self._tenants = [next(_TENANTS) for _ in range(rows)]
        # Of every row, when it was cut back to how many tokens; only cuts that none to fewer tokens came after.
        self._cuts: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
        self._cut = 0
        self._free = list(range(rows))
        self.streamed = Claim("cache: expected one that no other stream uses, found it in use; close that stream")
        self.running = Claim("cache: expected one that no other thread uses, found a step of another thread running")

    @property
    def rows(self) -> int:
        """How many rows there are, acquired or not."""
        return self._rows

    def acquire(self, count: int = 1) -> list[int]:
        """Take so many free rows, empty, the lowest ones. Raises DynexportError where there are fewer."""
        count = checked_count("rows", count)
        if count > len(self._free):
            raise DynexportError(
                f"cache: expected {count} free of {self.rows} rows, found {len(self._free)}; release one, or make a "
                "cache of more rows"
            )
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def release(self, row: int) -> None:
        """Give an acquired row back; what it holds is forgotten. Raises DynexportError for one that is free."""
        row = self.checked(row)
        self._forget(row)
        self._free = sorted([*self._free, row])

    def rewind(self, row: int) -> None:
        """Forget what an acquired row holds, and keep the row. Raises DynexportError for one that is free."""
        self._forget(self.checked(row))

    def checked(self, row: int) -> int:
        """Return an acquired row's number. Raises DynexportError for what is none."""
        row = checked_count("row", row, 0, self.rows - 1)
        if row in self._free:
            raise DynexportError(f"cache: row {row}: expected one that is acquired, found it free")
        return row

    def mark(self, row: int) -> Mark:
        """Return how much of an acquired row is in use now, for ``truncate``, ``copy_prefix``."""
        row = self.checked(row)
        steps = len(self.logs[row]) if self.logs is not None else 0
        return Mark(
            row,
            self._tenants[row],
            self.lengths[:, row].copy(),
            int(self.positions[row]),
            self.overflow[:, row].copy(),
            steps,
            self._cut,
        )

    def truncate(self, row: int, mark: Mark) -> None:
        """Cut a row back to a mark of its own.

        Raises:
            DynexportError: for a mark of another row or an earlier tenant, or one beyond what the row holds.
        """
        row = self.checked(row)
        if self._row_of(mark) != row:
            raise DynexportError(f"cache: row {row}: expected a mark of its own, found one of row {mark.row}")
        self._restore(mark)
        self._cut += 1
        self._cuts[row] = [cut for cut in self._cuts[row] if cut[1] < mark.position] + [(self._cut, mark.position)]

    def copy_prefix(self, mark: Mark, target: int) -> None:
        """Copy what a row held at a mark into an empty row: the beginning of a text that both share.

        Args:
            mark: of the row to copy from; it may have gone on since.
            target: an acquired row that holds nothing.

        Raises:
            DynexportError: for a mark beyond its row, a target that holds something, or where prompts' tokens compete
                for layers, so that a longer text has another prefix.
        """
        if self.manifest.limits.whole_prompts:
            raise DynexportError(
                "cache: expected a prefix whose tokens ran whatever came after them, found a prompt that top-k decided "
                "as a whole; run the prompt again"
            )
        self._row_of(mark)
        target = self.checked(target)
        if self.positions[target]:
            raise DynexportError(
                f"cache: row {target}: expected an empty row to copy to, found {self.positions[target]} tokens"
            )
        self._copy(mark, target)

    def move(self, row: int, target: int) -> None:
        """Move an acquired row to a free one, whose number it has from then on; its own is free.

        Raises:
            DynexportError: for a row that is free, or a target that is not.
        """
        row, target = self.checked(row), checked_count("row", target, 0, self.rows - 1)
        if target not in self._free:
            raise DynexportError(f"cache: row {target}: expected a free row to move to, found it acquired")
        self._free.remove(target)
        self._copy(self.mark(row), target)
        if self.logs is not None:
            self.logs[target] = self.logs[row].copy()
        self.release(row)

    def commit(self, rows: slice, counts: Array, entries: Array, decisions: Sequence[Decisions] | None) -> None:
        """Count what a call has written.

        Args:
            rows: of the call.
            counts: int64 [B], tokens of each.
            entries: int64 [places, B].
            decisions: of each row; None where there are none to count or to record.
        """
        self.lengths[:, rows] += entries
        try:
            self._count(rows, counts, decisions)
        except BaseException:  # an interrupt comes between any two lines
            self.lengths[:, rows] -= entries
            raise
        self.positions[rows] += counts

    def _count(self, rows: slice, counts: Array, decisions: Sequence[Decisions] | None) -> None:
        """Count the tokens that found no room, and record decisions."""
        if decisions is None:
            return
        for row, count, made in zip(range(rows.start, rows.stop), counts, decisions, strict=True):
            if count:
                if len(made.overflow):
                    self.overflow[:, row] += made.overflow
                if self.logs is not None:
                    self.logs[row].append(made)

    @contextmanager
    def as_it_was_on_error(self, rows: Sequence[int]) -> Iterator[None]:
        """Within, entries may come call by call: when one fails, or is interrupted, none of them counts."""
        lengths, positions, overflow = self.lengths.copy(), self.positions.copy(), self.overflow.copy()
        steps = None if self.logs is None else [len(log) for log in self.logs]
        try:
            yield
        except BaseException:
            for row in rows:
                kept = 0 if steps is None else steps[row]
                self._restore(Mark(row, 0, lengths[:, row], int(positions[row]), overflow[:, row], kept))
            raise

    def check_step(self, first: int, count: int) -> None:
        """Raise DynexportError where one of some rows side by side is free, or has no room for a token more."""
        if first < 0 or first + count > self.rows or self._free:
            for row in range(first, first + count):
                self.checked(row)
        if max(self.positions[first : first + count].tolist()) >= self.tokens:
            for row in range(first, first + count):
                self.check_room(row, 1, is_prompt=False)

    def check_room(self, row: int, tokens: int, *, is_prompt: bool) -> None:
        """Raise DynexportError when a row has no room for so many tokens more."""
        room = self.tokens - int(self.positions[row])
        if tokens <= room:
            return
        if not is_prompt and not room:
            raise DynexportError(f"cache: all {self.tokens} slots of a row are used; the context is exhausted")
        raise DynexportError(
            f"{'prompt' if is_prompt else 'tokens'}: expected at most {room} tokens to fit the context of "
            f"{self.tokens}, found {tokens}"
        )

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens, at most ``tokens`` of the cache.

        Raises:
            DynexportError: where there is not so much memory; nothing has changed then.
        """
        if min(tokens, self.tokens) <= self._room:
            return
        room = min(self.tokens, max(tokens, 2 * self._room))
        slots, grown = [self._layout.slots(place, room) for place in range(self._layout.places)], Buffers()
        for place, count in enumerate(slots):
            used = int(self.lengths[place].max())
            for name, larger in self._allocated(place, count).items():
                larger[_first(larger, used)] = self.buffers[name][_first(larger, used)]
                grown[name] = larger
        # Another dict: engines bind what one holds.
        self.buffers, self._slots, self._room = grown, slots, room

    def check_entries(self, place: int, entries: int) -> None:
        """Raise DynexportError where a row would need more entries than a place has slots."""
        if entries > self._slots[place]:
            raise DynexportError(
                f"cache: all {self._slots[place]} entries of a row are used, as many as there is room for, {entries} "
                "are needed; the context is exhausted"
            )

    def is_full(self, row: int) -> bool:
        """Whether a call that a row takes no part in would write over one of its entries."""
        return bool((self.lengths[:, row] >= np.array(self._slots)).any())

    def _forget(self, row: int) -> None:
        self._tenants[row] = next(_TENANTS)
        self._cuts[row] = []
        for counts in (self.lengths, self.positions, self.overflow):
            counts[..., row] = 0
        if self.logs is not None:
            self.logs[row] = []

    def _restore(self, mark: Mark) -> None:
        self.lengths[:, mark.row] = mark.lengths
        self.positions[mark.row] = mark.position
        self.overflow[:, mark.row] = mark.overflow
        if self.logs is not None:
            del self.logs[mark.row][mark.steps :]

    def _row_of(self, mark: Mark) -> int:
        """Return a mark's row. Raises DynexportError where what it marks is no part of that row any more."""
        checked_kind("mark", mark, Mark, "one of KvCache.mark")
        row = self.checked(mark.row)
        if mark.tenant != self._tenants[row]:
            raise DynexportError(f"cache: row {row}: expected a mark of this text, found one of an earlier one")
        if any(mark.made < made and mark.position > tokens for made, tokens in self._cuts[row]):
            raise DynexportError(
                f"cache: row {row}: expected a mark within its {self.positions[row]} tokens, found one after "
                f"{mark.position}; it was cut back since"
            )
        return row

    def _copy(self, mark: Mark, target: int) -> None:
        for place in range(self._layout.places):
            for part in self._layout.caches[place].parts:
                self._backend.copy_row(self.buffers[f"{place}.{part}"], mark.row, target, int(mark.lengths[place]))
        self.lengths[:, target] = mark.lengths
        self.positions[target] = mark.position
        self.overflow[:, target] = mark.overflow
        if self.logs is not None and mark.row != target:
            self.logs[target] = self.logs[mark.row][: mark.steps]

    def _allocated(self, place: int, slots: int) -> dict[str, Array]:
        parts = self._layout.caches[place].parts
        shapes = self._layout.shapes(place, self.rows, slots)
        try:
            return {
                f"{place}.{name}": self._backend.allocate(shape, parts[name].array_type)
                for name, shape in shapes.items()
            }
        except (MemoryError, ValueError) as error:  # the second where the size overflows
            size = self._layout.places * sum(math.prod(shape) * 4 for shape in shapes.values())
            raise DynexportError(
                f"cache: {self.rows} rows of {self.tokens} tokens need {size / 2**30:.1f} GiB, more than there is; "
                "lower the batch or the number of tokens"
            ) from error


def _first(buffer: Array, entries: int) -> tuple[slice, ...]:
    """The first entries of all rows of a buffer [rows, heads, slots, size] or [rows, slots]."""
    return (slice(None),) * (buffer.ndim // 2) + (slice(entries),)


__all__ = ["STEP", "KvCache", "Mark"]
