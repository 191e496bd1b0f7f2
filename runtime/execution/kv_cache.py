"""The KV caches of a batch's rows, and the only writer of their lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.engines.engine import Backend, Buffers
from dynexport.runtime.execution.claim import Claim
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.mark import Mark, Saved, Texts
from dynexport.runtime.execution.memory import CacheMemory

Array = np.ndarray
# Tokens per row to allocate first in a long context, where the final number is unknown.
STEP = 1024


class KvCache:
    """KV caches with a fixed number of rows and a largest number of tokens per row.

    A row is acquired, filled by an ``Executor``, truncated to a mark if needed, and released.

    Attributes:
        manifest: the manifest of the bundle that the cache was made for.
        tokens: capacity of a row in tokens.
        lengths: int64 [places, rows], number of entries in use; read only.
        positions: int64 [rows], number of tokens seen, which is the next token's position; read only.
        overflow: int64 [counters, rows], number of tokens that found a layer or its cache full; read only.
        logs: per row the decisions of every call; None unless they are recorded.
        streamed: the claim of the stream that uses the cache.
        running: the claim of the run that uses the cache.

    Args:
        manifest: the bundle's manifest.
        layout: the shapes of the bundle's caches.
        backend: allocates the memory.
        rows: number of rows.
        tokens: capacity of a row in tokens; the model's context is the upper limit.
        counters: number of overflow counters per row.
        record: true keeps logs.
        room: tokens per row to allocate memory for now; None allocates for all.

    Raises:
        DynexportError: for sizes below 1, more rows than the engines' limit, or too little memory.
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
                f"batch: expected at most {limit} rows, the limit of the bundle's engines, found {rows}; convert it "
                f"again with --max-batch {rows}"
            )
        self.manifest, self.tokens = manifest, min(checked_count("slots", tokens), manifest.model.max_length)
        self._rows = rows
        self._memory = CacheMemory(layout, backend, rows, self.tokens, room)
        self.lengths = np.zeros((layout.places, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)
        self.overflow = np.zeros((counters, rows), np.int64)
        self.logs: list[list[Decisions]] | None = [[] for _ in range(rows)] if record else None
        self._texts = Texts(rows)
        self._free = list(range(rows))
        self.streamed = Claim("cache: expected one that no other stream uses, found it in use; close that stream")
        self.running = Claim("cache: expected one that no other thread uses, found a step of another thread running")

    @property
    def buffers(self) -> Buffers:
        """The memory, "{place}.{part}" -> [rows, ..]; another dictionary after the buffers have grown."""
        return self._memory.buffers

    @property
    def rows(self) -> int:
        """Number of rows, both acquired and free."""
        return self._rows

    @property
    def free(self) -> list[int]:
        """Numbers of the free rows, ascending."""
        return list(self._free)

    def acquire(self, count: int = 1) -> list[int]:
        """Acquire the ``count`` lowest free rows, which are empty. Raises DynexportError if fewer are free."""
        count = checked_count("rows", count)
        if count > len(self._free):
            raise DynexportError(
                f"cache: expected {count} free of {self.rows} rows, found {len(self._free)}; release one, or make a "
                "cache of more rows"
            )
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def release(self, row: int) -> None:
        """Free an acquired row and drop its entries. Raises DynexportError for a free row."""
        row = self.checked(row)
        self._forget(row)
        self._free = sorted([*self._free, row])

    def rewind(self, row: int) -> None:
        """Drop the entries of an acquired row, and keep the row. Raises DynexportError for a free row."""
        self._forget(self.checked(row))

    def checked(self, row: int) -> int:
        """Return a row's number after a check. Raises DynexportError unless it is an acquired row."""
        row = checked_count("row", row, 0, self.rows - 1)
        if row in self._free:
            raise DynexportError(f"cache: row {row}: expected one that is acquired, found it free")
        return row

    def mark(self, row: int) -> Mark:
        """Return a mark at the end of an acquired row, for ``truncate`` and ``copy_prefix``."""
        row = self.checked(row)
        steps = len(self.logs[row]) if self.logs is not None else 0
        return Mark(
            row,
            self._texts.tenant(row),
            self.lengths[:, row].copy(),
            int(self.positions[row]),
            self.overflow[:, row].copy(),
            steps,
            self._texts.truncations,
        )

    def truncate(self, row: int, mark: Mark) -> None:
        """Truncate a row to one of its marks.

        Raises:
            DynexportError: for a mark of another row or of an earlier text, or one beyond the row's end.
        """
        row = self.checked(row)
        if self._row_of(mark) != row:
            raise DynexportError(f"cache: row {row}: expected a mark of its own, found one of row {mark.row}")
        self._restore(mark)
        self._texts.truncate(row, mark.position)

    def copy_prefix(self, mark: Mark, target: int) -> None:
        """Copy a row's entries up to a mark into an empty row, for two texts with a common prefix.

        Args:
            mark: a mark of the source row, which may hold more tokens by now.
            target: an acquired row that is empty.

        Raises:
            DynexportError: for a mark beyond its row's end, a target that is not empty, or a bundle that routes
                prompts as a whole: there a prefix's entries depend on the tokens after it.
        """
        self._check_causal()
        self._row_of(mark)
        target = self.checked(target)
        if self.positions[target]:
            raise DynexportError(
                f"cache: row {target}: expected an empty row to copy to, found {self.positions[target]} tokens"
            )
        self._copy(mark, target)

    def save(self, row: int, lengths: Array, position: int) -> Saved:
        """Return copies of a row's last entries, for ``restore`` into a row that holds the same tokens before them.

        Args:
            row: an acquired row.
            lengths: int64 [places], number of entries before the first one to save.
            position: number of tokens before it.

        Raises:
            DynexportError: for a free row, or a bundle that routes prompts as a whole, as for ``copy_prefix``.
        """
        row = self.checked(row)
        self._check_causal()
        entries = self._memory.read(row, lengths.tolist(), self.lengths[:, row].tolist())
        return Saved(entries, lengths.copy(), self.lengths[:, row] - lengths, position, int(self.positions[row]))

    def restore(self, row: int, saved: Saved) -> None:
        """Append saved entries to an acquired row. Its log does not get the decisions of their tokens.

        Raises:
            DynexportError: for a free row, or one that does not end where the saved entries begin.
        """
        row = self.checked(row)
        if self.positions[row] != saved.first or (self.lengths[:, row] != saved.lengths).any():
            raise DynexportError(
                f"cache: row {row}: expected a row of {saved.first} tokens to append saved entries to, found "
                f"{self.positions[row]} tokens"
            )
        self.check_room(row, saved.tokens, is_prompt=True)
        self._memory.write(row, saved.lengths.tolist(), saved.entries)
        self.lengths[:, row] += saved.added
        self.positions[row] += saved.tokens

    def move(self, row: int, target: int) -> None:
        """Move an acquired row's entries to a free row, which becomes acquired; the source becomes free.

        Raises:
            DynexportError: for a source that is free, or a target that is acquired.
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
        """Add the entries that a call wrote to the rows' lengths.

        Args:
            rows: the call's rows.
            counts: int64 [B], number of tokens of each row.
            entries: int64 [places, B], number of new entries.
            decisions: one per row; None without routers if the cache does not record.
        """
        self.lengths[:, rows] += entries
        try:
            self._count(rows, counts, decisions)
        except BaseException:  # such as KeyboardInterrupt: lengths and positions change together
            self.lengths[:, rows] -= entries
            raise
        self.positions[rows] += counts

    def _count(self, rows: slice, counts: Array, decisions: Sequence[Decisions] | None) -> None:
        """Count the tokens that found a layer full, and record decisions."""
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
        """Restore the rows' lengths if the body raises, so that a failed or interrupted batch has no effect."""
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
        """Raise DynexportError if one of ``count`` adjacent rows is free or has no room for another token."""
        if first < 0 or first + count > self.rows or self._free:
            for row in range(first, first + count):
                self.checked(row)
        if max(self.positions[first : first + count].tolist()) >= self.tokens:
            for row in range(first, first + count):
                self.check_room(row, 1, is_prompt=False)

    def check_room(self, row: int, tokens: int, *, is_prompt: bool) -> None:
        """Raise DynexportError when a row has no room for ``tokens`` more tokens."""
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
        """Grow the buffers to hold ``tokens`` tokens per row, or the cache's capacity if that is less.

        Raises:
            DynexportError: for too little memory; the cache is then unchanged.
        """
        self._memory.reserve(tokens, self.lengths.max(axis=1).tolist())

    def check_entries(self, place: int, entries: int) -> None:
        """Raise DynexportError when ``entries`` exceeds the number of slots per row of a place."""
        if entries > (slots := self._memory.slots[place]):
            raise DynexportError(
                f"cache: expected at most {slots} entries of a row, found {entries}; the context is exhausted"
            )

    def room(self, row: int) -> int:
        """Return the number of slots behind a row's entries that a call may write without growing the buffers."""
        return int((np.array(self._memory.slots) - self.lengths[:, row]).min())

    def _check_causal(self) -> None:
        """Raise DynexportError if a prefix's entries depend on the tokens after it."""
        if self.manifest.limits.whole_prompts:
            raise DynexportError(
                "cache: expected a prefix that does not depend on the tokens after it, found a prompt that is "
                "routed as a whole (top-k, or a decision about a sequence); run the prompt again"
            )

    def _forget(self, row: int) -> None:
        self._texts.renew(row)
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
        """Return a mark's row. Raises DynexportError for a mark that is no longer valid."""
        checked_kind("mark", mark, Mark, "one of KvCache.mark")
        row = self.checked(mark.row)
        self._texts.check(mark, int(self.positions[row]))
        return row

    def _copy(self, mark: Mark, target: int) -> None:
        self._memory.copy_row(mark.row, target, mark.lengths.tolist())
        self.lengths[:, target] = mark.lengths
        self.positions[target] = mark.position
        self.overflow[:, target] = mark.overflow
        if self.logs is not None and mark.row != target:
            self.logs[target] = self.logs[mark.row][: mark.steps]


__all__ = ["STEP", "KvCache", "Mark"]
