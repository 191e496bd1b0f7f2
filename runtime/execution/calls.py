"""Split a batch into calls: ranges of adjacent rows and chunks of prompts that the program and the caches accept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, Limits
from dynexport.runtime.execution.batch import Call, EvenChunks
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.kv_cache import KvCache

Array = np.ndarray
# Computing up to this many idle rows between two active ones costs less than a second call, which reads the weights
# once more (docs/benchmarks.md, "Rows of a batch").
_MOST_IDLE = 2
# Up to this many tokens a row, padding costs less than reading the weights once more for every row.
_SHORT = 65


@dataclass
class Part:
    """One row's share of a batch, and its results so far.

    Attributes:
        row: the row's number in the cache.
        ids: token ids, int64 [n].
        wanted: int64 [k], ascending indices of the tokens whose logits are returned.
        forced: int64 [R, n], forced decisions; -1 leaves one to its router.
        done: number of tokens that have run.
        logits: float32 [.., vocab], one array per finished chunk.
        decisions: one per finished chunk.
    """

    row: int
    ids: Array
    wanted: Array
    forced: Array
    done: int = 0
    logits: list[Array] = field(default_factory=list)
    decisions: list[Decisions] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Number of tokens that have not run."""
        return len(self.ids) - self.done


@dataclass(frozen=True)
class Piece:
    """The chunk of a row's tokens that one call runs."""

    part: Part
    count: int

    @property
    def tokens(self) -> slice:
        """The chunk's range in the part's tokens."""
        return slice(self.part.done, self.part.done + self.count)

    @property
    def wanted(self) -> Array:
        """Indices within the chunk of the tokens whose logits are returned, int64 [k]."""
        inside = self.part.wanted - self.part.done
        return inside[(inside >= 0) & (inside < self.count)]


class Cutter:
    """Decides which rows and tokens share a call.

    Args:
        cache: the cache that the batch runs on.
        limits: the bundle's limits.
        graph: the graph whose sizes also limit a call.
        chunk: the largest number of a row's tokens in one call, or chunks by position.
    """

    def __init__(self, cache: KvCache, limits: Limits, graph: Graph, chunk: int | EvenChunks) -> None:
        self._cache, self._limits, self._chunk = cache, limits, chunk
        in_graph = [spec.shape[1] for spec in graph.inputs if spec.name == "input_ids"]
        self._pads = bool(in_graph)  # a set of graphs takes the tokens of all rows in one line
        fixed = [size for size in in_graph if isinstance(size, int)]  # a decode graph has a fixed size
        first = chunk.first if isinstance(chunk, EvenChunks) else chunk
        self._most = min(filter(None, (first, limits.prompt, graph.limit("S"), graph.limit("C"), *fixed)))

    def pieces(self, parts: Sequence[Part]) -> Iterator[list[Piece]]:
        """Yield the chunks of each call, rows ascending; the caller runs a call before it takes the next."""
        longest = max(part.left for part in parts)
        if longest == 1:
            for parts_side_by_side in self._ranges(parts, _MOST_IDLE):
                yield [Piece(part, 1) for part in parts_side_by_side]
            return
        most = self._tokens_of_a_row(parts, longest)
        if self._limits.together == "always" and (not self._pads or longest <= _SHORT):
            yield from self._side_by_side(parts, most)
            return
        if self._limits.together != "never" and all(self._size(part, most) == part.left for part in parts):
            for side_by_side in self._ranges([part for part in parts if self._is_empty(part.row)], None):
                if len(side_by_side) > 1:
                    yield [Piece(part, part.left) for part in side_by_side]
        for part in parts:
            while part.left:
                filled = None if self._is_empty(part.row) else self._limits.filled
                yield [Piece(part, min(self._size(part, most), filled or most))]

    def _side_by_side(self, parts: Sequence[Part], most: int) -> Iterator[list[Piece]]:
        """Yield the chunks of rows that share a call whatever their caches hold."""
        while rest := [part for part in parts if part.left]:
            longest = max(self._size(part, most) for part in rest)
            for group in self._ranges(rest, _MOST_IDLE, longest) if self._pads else [rest]:
                yield [Piece(part, self._size(part, most)) for part in group]

    def _size(self, part: Part, most: int) -> int:
        """Return the number of tokens of a row's next chunk."""
        if isinstance(self._chunk, EvenChunks) and not self._limits.whole_prompts:
            most = min(most, self._chunk.size(int(self._cache.positions[part.row])))
        return min(part.left, most)

    def _tokens_of_a_row(self, parts: Sequence[Part], longest: int) -> int:
        """Return the largest number of tokens of each row in one call."""
        limits, most = self._limits, self._most
        if limits.logits is not None and any(len(part.wanted) > limits.logits for part in parts):
            most = min(most, limits.logits)
        if limits.tokens is not None:
            most = min(most, max(1, limits.tokens // len(parts)))
        if not limits.whole_prompts:
            return most
        if limits.prompt is not None and longest > limits.prompt:
            raise DynexportError(
                f"prompt: expected at most {limits.prompt} tokens, the bundle's limit for a prompt that top-k routes "
                f"as a whole, found {longest}; convert it again with --max-prompt {longest}"
            )
        return longest

    def _ranges(self, parts: Sequence[Part], most_idle: int | None, tokens: int = 1) -> Iterator[list[Part]]:
        """Split rows where too many idle rows lie between, or one whose entries the call would overwrite.

        Args:
            parts: of rows in ascending order.
            most_idle: the largest number of idle rows between two; None accepts any number of empty rows.
            tokens: number of tokens that the call writes for every row, padding included.
        """
        found: list[Part] = []
        for part in parts:
            between = range(found[-1].row + 1, part.row) if found else range(0)
            if most_idle is None:
                apart = not all(map(self._is_empty, between))
            else:
                ends = [*(each.row for each in found[-1:]), part.row] if tokens > 1 else []
                apart = len(between) > most_idle or any(self._cache.room(row) < tokens for row in (*between, *ends))
            if found and apart:
                yield found
                found = []
            found.append(part)
        if found:
            yield found

    def _is_empty(self, row: int) -> bool:
        return not self._cache.positions[row]


def call_of(pieces: Sequence[Piece], active: Array, *, is_prompt: bool) -> Call:
    """Return the call that runs some chunks, right-padded.

    Args:
        pieces: at most one chunk per row, rows ascending.
        active: bool [layers], true for layers that run.
        is_prompt: true for tokens of a prompt, false for generated tokens.
    """
    first, last = pieces[0].part, pieces[-1].part
    rows = slice(first.row, last.row + 1)
    if len(pieces) == 1:  # the most frequent case in a server; it needs no copies
        piece = pieces[0]
        forced = first.forced[:, None, piece.tokens]
        return Call(
            rows, first.ids[None, piece.tokens], np.array([piece.count]), active, piece.wanted[None], forced, is_prompt
        )
    size, longest = rows.stop - rows.start, max(piece.count for piece in pieces)
    asked = [piece.wanted for piece in pieces]
    ids = np.zeros((size, longest), np.int64)
    counts = np.zeros(size, np.int64)
    wanted = np.zeros((size, max(map(len, asked))), np.int64)
    forced = np.full((len(first.forced), size, longest), -1, np.int64)
    for piece, places in zip(pieces, asked, strict=True):
        row = piece.part.row - rows.start
        ids[row, : piece.count] = piece.part.ids[piece.tokens]
        forced[:, row, : piece.count] = piece.part.forced[:, piece.tokens]
        counts[row] = piece.count
        wanted[row] = np.resize(places, wanted.shape[1]) if len(places) else piece.count - 1
    return Call(rows, ids, counts, active, wanted, forced, is_prompt)


__all__ = ["Cutter", "Part", "Piece", "call_of"]
