"""Draft the next tokens of a row cheaply, for a verification of several tokens in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.filters import draw
from dynexport.runtime.generation.sampler import RowSampler

Array = np.ndarray
# Lengths of the token sequences that prompt lookup searches for, longest first.
_LOOKED_UP = (4, 3, 2)


class DraftedRow(Protocol):
    """A row of a batch, as a drafter reads it.

    Attributes:
        row: its row in the cache.
        token: the latest token, which has not run.
        depth: the depth of its tokens.
        sampler: chooses its tokens.
        known: its tokens so far.
    """

    row: int
    known: KnownTokens

    @property
    def token(self) -> int: ...
    @property
    def depth(self) -> Depth: ...
    @property
    def sampler(self) -> RowSampler: ...


class Drafter(Protocol):
    """Proposes tokens that the full model verifies."""

    def available(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[int]:
        """Return how many tokens it can draft for each row, at most ``most``."""

    def drafts(self, cache: KvCache, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[list[int]]:
        """Return up to ``counts`` tokens for each row; the cache is afterwards as before."""


class KnownTokens:
    """A row's tokens, with the place of the latest occurrence of each short sequence of them.

    Args:
        tokens: the tokens so far.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(int(token))

    def __len__(self) -> int:
        return len(self._ids)

    def push(self, token: int) -> None:
        """Append a token."""
        place = len(self._ids)
        for size in _LOOKED_UP:
            if place >= size:
                self._after[tuple(self._ids[-size:])] = place
        self._ids.append(token)

    def continued(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the latest earlier occurrence of the last tokens.

        The longest sequence that occurred before is used (prompt lookup decoding, Saxena 2023). Where the occurrence
        reaches the end, the tokens repeat.
        """
        for size in _LOOKED_UP:
            if len(self._ids) > size and (place := self._after.get(tuple(self._ids[-size:]))) is not None:
                period = len(self._ids) - place
                return [self._ids[place + index % period] for index in range(most)]
        return []


class PromptLookup:
    """Drafts by the row's own text: what followed its last tokens before."""

    def available(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[int]:
        """Return how many tokens it can draft for each row: all, or none where the last tokens are new."""
        return [len(row.known.continued(limit)) for row, limit in zip(rows, most, strict=True)]

    def drafts(self, cache: KvCache, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[list[int]]:
        """Return the tokens that followed the latest occurrence of each row's last tokens."""
        return [row.known.continued(count) for row, count in zip(rows, counts, strict=True)]


class ShallowDepth:
    """Drafts by running fewer layers of the same bundle.

    A draft is chosen as the full model would choose: greedily, or with the random number that the full model's choice
    will use, so that both agree where their distributions do.

    Args:
        executor: runs the bundle's graphs.
        depth: the depth that drafts.
    """

    def __init__(self, executor: Executor, depth: Depth) -> None:
        self._executor, self._depth = executor, depth

    def available(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[int]:
        """Return how many tokens it can draft for each row: as many as wanted."""
        return list(most)

    def drafts(self, cache: KvCache, rows: Sequence[DraftedRow], counts: Sequence[int]) -> list[list[int]]:
        """Return ``counts`` tokens for each row, one decode step of the drafting depth for each."""
        marks = [cache.mark(row.row) for row in rows]
        found: list[list[int]] = [[] for _ in rows]
        for index in range(max(counts, default=0)):
            going = [place for place, count in enumerate(counts) if count > index]
            tokens = [found[place][-1] if index else rows[place].token for place in going]
            at = [rows[place].row for place in going]
            logits = self._executor.decode(cache, at, tokens, [self._depth] * len(going), lasting=False)
            for place, values in zip(going, logits, strict=True):
                found[place].append(_drafted(values, rows[place].sampler, index))
        for row, mark in zip(rows, marks, strict=True):
            cache.truncate(row.row, mark)
        return found


def _drafted(logits: Array, sampler: RowSampler, index: int) -> int:
    """Return the token to draft ``index`` tokens after the row's next one, from logits [vocab]."""
    token = int(logits.argmax())
    largest = float(logits[token])
    if sampler.greedy or not np.isfinite(largest):  # the full model reports logits that are not numbers
        return token
    with np.errstate(over="ignore"):
        return draw(logits, largest, sampler.sampling, sampler.upcoming(index))


__all__ = ["DraftedRow", "Drafter", "KnownTokens", "PromptLookup", "ShallowDepth"]
