"""The K/V caches of a batch: preallocated once, written in place, with a length per layer and row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest, Model, TensorSpec
from dynexport.runtime.execution.claim import Claim
from dynexport.runtime.execution.routes import RowLog

Buffers = dict[str, np.ndarray]
# Tokens that rows of a long context have room for at first, where nobody knows how many there will be.
STEP = 1024


class Entries:
    """How much of a cache is in use, whatever its buffers are.

    Attributes:
        model: what its entries are of.
        slots: tokens that a row may have.
        lengths: int64 [layers or steps, rows], entries in use.
        positions: int64 [rows], tokens seen: the next token's original position.
        overflow: int64 [R, rows], tokens that found a routed layer's cache full.
        logs: what became of every token, per row; None where nobody wants to know.
        streamed, running: held by the stream, and by the prompt or step, that uses it.
    """

    model: Model
    slots: int
    lengths: np.ndarray
    positions: np.ndarray
    overflow: np.ndarray
    logs: list[RowLog] | None
    streamed: Claim
    running: Claim

    def begin(self, manifest: Manifest, rows: int, slots: int, *, caches: int, routers: int, record: bool) -> None:
        """Nothing is in use yet."""
        self.model, self.slots = manifest.model, slots
        self.lengths = np.zeros((caches, rows), np.int64)
        self.positions = np.zeros(rows, np.int64)
        self.overflow = np.zeros((routers, rows), np.int64)
        self.logs = [RowLog() for _ in range(rows)] if record else None
        self.streamed = Claim("cache: expected one that no other stream uses, found it in use; close that stream")
        self.running = Claim("cache: expected one that no other thread uses, found a step of another thread running")

    @property
    def rows(self) -> int:
        """Sequences in the batch."""
        return len(self.positions)

    def mark(self) -> tuple[np.ndarray, ...]:
        """How much is in use now, for ``restore``."""
        return self.lengths.copy(), self.positions.copy(), self.overflow.copy()

    def restore(self, mark: tuple[np.ndarray, ...]) -> None:
        """Forget what came after a mark; logs keep it."""
        self.lengths[:], self.positions[:], self.overflow[:] = mark

    @contextmanager
    def as_it_was_on_error(self) -> Iterator[None]:
        """Within, entries may come piece by piece: when one fails, or is interrupted, none of them counts."""
        mark, steps = self.mark(), [len(log.ran) for log in self.logs or ()]
        try:
            yield
        except BaseException:
            self.restore(mark)
            for log, count in zip(self.logs or (), steps, strict=True):
                log.keep(count)
            raise

    def check_room(self, live: np.ndarray | None) -> None:
        """Raise DynexportError when a row has no slot left for one more token; live bool [rows], None for all."""
        positions = self.positions if live is None else self.positions[live]
        if (positions >= self.slots).any():
            raise DynexportError(f"cache: all {self.slots} slots of a row are used; the context is exhausted")

    def rewind(self) -> None:
        """Forget every entry; the memory stays."""
        for counts in (self.lengths, self.positions, self.overflow):
            counts[:] = 0
        for log in self.logs or ():
            log.clear()


def check_sizes(manifest: Manifest, rows: int, slots: int) -> None:
    """Raise DynexportError for what is no number of rows or slots, or more rows than engines are built for."""
    checked_kind("manifest", manifest, Manifest, "a Manifest")
    checked_count("rows", rows)
    checked_count("slots", slots)
    limit = manifest.limit("B")
    if limit is not None and rows > limit:
        raise DynexportError(
            f"batch: expected at most {limit} rows, which the bundle's engines are for, found {rows}; convert it "
            f"again with --max-batch {rows}"
        )


def zeroed(specs: Mapping[str, TensorSpec], sizes: Mapping[str, int], slots: int, places: int = 1) -> list[Buffers]:
    """Buffers for every place, as a graph wants its caches.

    Args:
        sizes: of a graph's dimensions, by symbol.
        slots: tokens that a row may have.

    Raises:
        DynexportError: where there is not so much memory.
    """
    shapes = {name: (spec.sized(sizes), spec.array_type) for name, spec in specs.items()}
    try:
        return [{name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()} for _ in range(places)]
    except (MemoryError, ValueError) as error:  # the second where the size overflows
        size = places * sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        raise DynexportError(
            f"cache: {sizes['B']} rows of {slots} tokens need {size / 2**30:.1f} GiB, more than there is; "
            "lower the batch or the number of tokens"
        ) from error


class Cache(Entries):
    """Caches for ``rows`` sequences of up to ``slots`` tokens.

    A layer that chooses its tokens has room for fewer entries, where the contract says so. Buffers may have room for
    fewer tokens than ``slots`` as yet: ``reserve`` makes more.

    Attributes:
        buffers: "{layer}.key" and "{layer}.value" [rows, kv_heads, its slots, head_dim]; "{layer}.position" int64
            [rows, its slots] for layers that need the original positions. Their types, and where graphs have numbers
            for slots, these too, are those of the graphs' inputs. bfloat16 is held as uint16.

    Args:
        record: keep logs.
        room: tokens that rows have room for at first; None for all.
    """

    def __init__(
        self, manifest: Manifest, rows: int, slots: int, *, record: bool = False, room: int | None = None
    ) -> None:
        check_sizes(manifest, rows, slots)
        self._manifest, self._room = manifest, slots if room is None else min(slots, room)
        self.buffers = self._zeroed(rows, slots, self._room)
        routers = len(manifest.routed.layers) if manifest.routed else 0
        self.begin(manifest, rows, slots, caches=manifest.model.layers, routers=routers, record=record)

    def _zeroed(self, rows: int, slots: int, room: int) -> Buffers:
        """Buffers with room for so many tokens a row."""
        sizes = {"B": rows, "M": room}
        if self._manifest.routed:
            sizes["M_routed"] = layer_slots(self._manifest, self._manifest.routed.layers[0], room)
        return zeroed(self._manifest.graphs[0].caches, sizes, slots)[0]

    def reserve(self, tokens: int) -> None:
        """Make room for rows of so many tokens, at most ``slots``; not through a view of a row.

        Raises:
            DynexportError: where there is not so much memory; nothing has changed then.
        """
        if min(tokens, self.slots) <= self._room:
            return
        room = min(self.slots, max(tokens, 2 * self._room))
        grown = self._zeroed(self.rows, self.slots, room)
        for name, buffer in self.buffers.items():
            copy_entries(buffer, grown[name])
        self.buffers, self._room = grown, room

    def written_lengths(self) -> np.ndarray:
        """``lengths`` at which a step may write: a row that has ended writes over its last slot, never read again."""
        return np.asarray(np.minimum(self.lengths, self._room - 1))

    def row(self, index: int) -> Cache:
        """A view of one row: the same memory, so what is written there is written here."""
        checked_count("row", index, 0, self.rows - 1)
        view = object.__new__(type(self))
        view._manifest, view._room = self._manifest, self._room
        view.model, view.slots = self.model, self.slots
        view.buffers = {name: buffer[index : index + 1] for name, buffer in self.buffers.items()}
        view.lengths = self.lengths[:, index : index + 1]
        view.positions = self.positions[index : index + 1]
        view.overflow = self.overflow[:, index : index + 1]
        view.logs = None if self.logs is None else self.logs[index : index + 1]
        view.streamed, view.running = self.streamed, self.running
        return view


def copy_entries(buffer: np.ndarray, larger: np.ndarray) -> None:
    """Copy [rows, heads, slots, size] or [rows, slots] to the beginning of a buffer with more slots."""
    places = (..., slice(buffer.shape[2]), slice(None)) if buffer.ndim == 4 else (..., slice(buffer.shape[1]))
    larger[places] = buffer


def layer_slots(manifest: Manifest, layer: int, slots: int) -> int:
    """Slots of a layer's buffer for rows of ``slots`` tokens, slack included."""
    routed = manifest.routed
    if routed is None or layer not in routed.layers:
        return slots
    return min(slots, routed.slots) + routed.slack
