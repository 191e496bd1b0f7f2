"""Draft the next tokens of a row cheaply, for a verification of several tokens in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import Acceptance, Trust
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
        acceptance: how many of its drafts were accepted.
    """

    row: int
    known: KnownTokens
    acceptance: Acceptance

    @property
    def token(self) -> int: ...
    @property
    def depth(self) -> Depth: ...
    @property
    def sampler(self) -> RowSampler: ...


@dataclass(frozen=True)
class Proposal:
    """What can be drafted for a row.

    Attributes:
        chances: for each token the probability that it and all before it are accepted.
        tokens: the tokens, if they are known before they are wanted; else empty.
        foreseen: whether they come from a table that has probabilities of its own, so that the row's acceptance says
            nothing of them.
    """

    chances: Sequence[float] = ()
    tokens: list[int] = field(default_factory=list)
    foreseen: bool = False

    @classmethod
    def alike(cls, rate: float, count: int, tokens: Sequence[int] = ()) -> Proposal:
        """Return a proposal of ``count`` tokens, each accepted with probability ``rate`` if all before it were."""
        return cls([rate ** (index + 1) for index in range(count)], list(tokens))


class Drafter(Protocol):
    """Proposes tokens that the full model verifies."""

    def proposals(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[Proposal]:
        """Return what it can draft for each row, at most ``most`` tokens."""

    def drafts(
        self, cache: KvCache, rows: Sequence[DraftedRow], proposals: Sequence[Proposal], counts: Sequence[int]
    ) -> list[list[int]]:
        """Return up to ``counts`` tokens for each row; the cache is afterwards as before."""


class KnownTokens:
    """A row's tokens, with the place of the latest occurrence of each short sequence of them.

    Args:
        tokens: the tokens so far.

    Attributes:
        trust: how often a table foresaw them; None before any was compared.
        compared: number of tokens, from the first on, that are not to be compared any more.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.trust: Trust | None = None
        self.compared = 0
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(int(token))

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, places: slice) -> list[int]:
        return self._ids[places]

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

    def proposals(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[Proposal]:
        """Return what can be drafted for each row: all tokens, or none where the last ones are new."""
        return [_continued(row, limit) for row, limit in zip(rows, most, strict=True)]

    def drafts(
        self, cache: KvCache, rows: Sequence[DraftedRow], proposals: Sequence[Proposal], counts: Sequence[int]
    ) -> list[list[int]]:
        """Return the tokens that followed the latest occurrence of each row's last tokens."""
        return [each.tokens[:count] for each, count in zip(proposals, counts, strict=True)]


def _continued(row: DraftedRow, most: int) -> Proposal:
    tokens = row.known.continued(most)
    return Proposal.alike(row.acceptance.rate, len(tokens), tokens)


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

    def proposals(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[Proposal]:
        """Return what it can draft for each row: as many tokens as wanted."""
        return [Proposal.alike(row.acceptance.rate, limit) for row, limit in zip(rows, most, strict=True)]

    def drafts(
        self, cache: KvCache, rows: Sequence[DraftedRow], proposals: Sequence[Proposal], counts: Sequence[int]
    ) -> list[list[int]]:
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


__all__ = ["DraftedRow", "Drafter", "KnownTokens", "PromptLookup", "Proposal", "ShallowDepth"]
