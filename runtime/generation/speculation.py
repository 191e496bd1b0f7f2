"""Speculative decoding: cheap drafts of the next tokens, verified by the full model in one call.

Every token is chosen from the full model's logits with the row's own random numbers; drafts only decide how many
tokens a call computes. So a row's tokens are those of decoding without drafts, greedily and with a seed, but for
rounding where two tokens are equally probable.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.bundle.drafting import MOST_DRAFTS
from dynexport.runtime.bundle.errors import DynexportError, RouteError
from dynexport.runtime.bundle.manifest import Depth, Manifest
from dynexport.runtime.bundle.ngrams import NgramTable
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kept import keep_first
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import (
    HOPED_OF_DEPTH,
    HOPED_OF_LOOKUP,
    LATEST,
    Acceptance,
    CallTimes,
    best_count,
)
from dynexport.runtime.generation.drafts import DraftedRow, Drafter, PromptLookup, Proposal, ShallowDepth
from dynexport.runtime.generation.ngram_drafts import NgramLookup
from dynexport.runtime.generation.request import Piece, Request
from dynexport.runtime.generation.sampler import choose

Array = np.ndarray
# The name of a depth that drafts and that the bundle does not declare.
DRAFT = "draft"
# A table always has a draft, whose probability is never quite right: they must promise so many times the speed.
_LEAST_GAIN_OF_TABLE = 1.05


@dataclass(frozen=True)
class Speculation:
    """Options of speculative decoding: who drafts, and how much.

    Attributes:
        most: most drafts of a row in a step, 1 to 64. Fewer are made where they are expected to take longer than they
            save.
        depth: the depth that drafts; None looks the row's last tokens up in its own text and then, if the bundle has
            one, in its n-gram table.
        always: every step drafts as many tokens as it can, whether that pays or not.

    Raises:
        DynexportError: for an argument of another type, or a number out of range.
    """

    most: int = 8
    depth: Depth | None = None
    always: bool = False

    def __post_init__(self) -> None:
        checked_count("speculate", self.most, 1, MOST_DRAFTS)
        checked_kind("always", self.always, bool, "true or false")

    @classmethod
    def of(cls, manifest: Manifest) -> Speculation:
        """Return what a bundle's manifest says, as calibration measured it; the defaults where it says nothing."""
        found = manifest.drafting
        if found is None:
            return cls()
        return cls(found.most, None if found.keep is None else depth_of_layers(manifest, found.keep))


def depth_of_layers(manifest: Manifest, layers: Sequence[int]) -> Depth:
    """Return the depth of some layers, for drafts.

    Raises:
        DynexportError: for layers that no depth of the bundle has and no graph of it can choose.
    """
    keep = tuple(sorted(layers))
    for depth in manifest.depths:
        if depth.keep == keep:
            return depth
    if not runs_any_layers(manifest):
        raise DynexportError(
            "drafting: expected the layers of a depth, as no graph of the bundle chooses layers, found "
            f"{list(keep)!s:.80}"
        )
    return Depth(name=DRAFT, ratio=None, keep=keep, prompt=manifest.full.prompt)


def runs_any_layers(manifest: Manifest) -> bool:
    """Return whether one graph decodes in any layers, and no router decides on them."""
    program = next((p for p in manifest.programs if p.phase == "decode" and p.depth is None), None)
    if manifest.routing is not None or program is None or program.graph is None:
        return False
    return any(spec.name == "layer_active" for spec in manifest.graph(program.graph).inputs)


@dataclass(frozen=True)
class Draft:
    """A row's drafted token ids, and whether they come from a table, as ``Proposal.foreseen`` says."""

    tokens: Sequence[int] = ()
    foreseen: bool = False


_NO_DRAFT = Draft()


class SpeculatedRow(DraftedRow, Protocol):
    """What a step with drafts needs of a row, beside what its drafter needs.

    Attributes:
        request: its request, which takes its tokens.
        most_drafts: most drafts of its next step.
    """

    request: Request
    most_drafts: int

    def take(self, pieces: Sequence[Piece]) -> None:
        """Take the tokens of a step, which its request has taken."""


class Speculator:
    """Runs decode steps with drafts, and learns how many pay. For one thread at a time.

    Attributes:
        most: most drafts of a row in a step.
        engine_seconds: time of the engine's calls in the latest step.

    Args:
        executor: runs the bundle's graphs.
        drafter: drafts tokens.
        speculation: its options.
        draft_share: the time of a draft as a share of a plain step's, before it is known.
        hoped: the acceptance of a row's drafts, before it is known.

    Raises:
        DynexportError: for a bundle whose tokens depend on the others of a call.
    """

    def __init__(
        self,
        executor: Executor,
        drafter: Drafter,
        speculation: Speculation,
        draft_share: float = 0.0,
        hoped: float = HOPED_OF_LOOKUP,
    ) -> None:
        if executor.limits.compete:
            raise DynexportError(
                f"{executor.bundle.path}: speculate: expected a model whose tokens do not depend on the others of a "
                "call, found one whose tokens compete for a layer's places"
            )
        self.most, self._always, self._by_depth = speculation.most, speculation.always, speculation.depth is not None
        self._executor, self._drafter, self._draft_share = executor, drafter, draft_share
        self._usual, self._hoped, self._calls = Acceptance(hoped), hoped, CallTimes()
        self.engine_seconds = 0.0

    @classmethod
    def of(cls, executor: Executor, speculation: Speculation) -> Speculator:
        """Return a speculator by its options. Raises DynexportError as the class does."""
        depth = speculation.depth
        if depth is None:
            table = NgramTable.of_bundle(executor.bundle)
            return cls(executor, PromptLookup() if table is None else NgramLookup(table), speculation)
        share = len(depth.keep) / executor.manifest.model.layers
        return cls(executor, ShallowDepth(executor, depth), speculation, share, HOPED_OF_DEPTH)

    def acceptance(self) -> Acceptance:
        """Return the acceptance of a new row's drafts: a depth is as good as for the rows before, a text is new."""
        return self._usual.of_next_row() if self._by_depth else Acceptance(self._hoped)

    def accepted(self, drafted: int, count: int) -> None:
        """Learn that the first ``count`` of ``drafted`` drafts of a row were accepted."""
        self._usual.add(drafted, count)

    def step(self, cache: KvCache, rows: Sequence[SpeculatedRow]) -> list[list[Piece] | DynexportError]:
        """Run a decode step.

        Args:
            cache: the rows' cache.
            rows: rows that have not ended; they and their requests take the tokens.

        Returns:
            Per row its new tokens, at least one; or the error of ``choose``, after which the row cannot go on.

        Raises:
            DynexportError: as for ``Executor.run``.
        """
        self.engine_seconds = 0.0
        drafts = self._drafts(cache, rows)
        try:
            return self._verified(cache, rows, drafts)
        except RouteError:  # of a draft perhaps, which would never have run
            if not any(draft.tokens for draft in drafts):
                raise
        return self._verified(cache, rows, [Draft() for _ in rows])

    def _count(self, proposals: Sequence[Proposal]) -> int:
        """Return how many tokens to draft for each row, which may have those of its proposal at most."""
        chances = [each.chances for each in proposals]
        if self._always:
            return max(map(len, chances), default=0)
        least_gain = _LEAST_GAIN_OF_TABLE if any(each.foreseen for each in proposals) else 1.0
        return best_count(chances, self._calls, self._draft_share, least_gain)

    def _hopeless(self, rows: Sequence[SpeculatedRow], limits: Sequence[int]) -> bool:
        """Return whether no number of drafts pays even if all of a row are as probable as its first."""
        first = self._drafter.proposals(rows, [min(1, limit) for limit in limits])
        alike = [replace(each, chances=list(each.chances) * limit) for each, limit in zip(first, limits, strict=True)]
        return not self._count(alike)

    def _drafts(self, cache: KvCache, rows: Sequence[SpeculatedRow]) -> list[Draft]:
        limits = [
            max(0, min(self.most, row.most_drafts, row.request.left - 1, cache.tokens - cache.positions[row.row] - 1))
            for row in rows
        ]
        none = [Draft() for _ in rows]
        if len(rows) > 1 and self._executor.limits.together != "always" and not self._always:
            return none  # a call of several tokens would run the rows one by one
        if not self._always and self._hopeless(rows, limits):
            return none
        proposals = self._drafter.proposals(rows, limits)
        count = self._count(proposals)
        if not count:
            return none
        begun = time.perf_counter()
        counts = [min(count, len(each.chances)) for each in proposals]
        found = self._drafter.drafts(cache, rows, proposals, counts)
        seconds = time.perf_counter() - begun
        self.engine_seconds += seconds
        if plain := self._calls.of(len(rows)):
            self._draft_share += LATEST * (seconds / count / plain - self._draft_share)
        return [Draft(tokens, each.foreseen) for tokens, each in zip(found, proposals, strict=True)]

    def _verified(
        self, cache: KvCache, rows: Sequence[SpeculatedRow], drafts: Sequence[Draft]
    ) -> list[list[Piece] | DynexportError]:
        """Run each row's latest token and its drafts, and keep the drafts that are chosen."""
        at, depths = [row.row for row in rows], [row.depth for row in rows]
        tokens = [[row.token, *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        marks = [cache.mark(row) for row in at] if any(draft.tokens for draft in drafts) else []
        begun = time.perf_counter()
        if marks:
            result = self._executor.run(cache, Batch(at, tokens, "decode", depths, "all"))
            logits = result.logits
            decisions: Sequence[Decisions | None] = result.decisions or [None] * len(rows)
        else:
            last = [row.token for row in rows]
            logits = list(self._executor.decode(cache, at, last, depths, lasting=False)[:, None])
        seconds = time.perf_counter() - begun
        self.engine_seconds += seconds
        self._calls.add(len(rows) * max(map(len, tokens)), seconds)
        found = [taken(*each) for each in zip(rows, logits, drafts, strict=True)]
        for kept, draft in zip(found, drafts, strict=True):
            if not isinstance(kept, DynexportError):
                self.accepted(len(draft.tokens), len(kept) - 1)
        for place, mark in enumerate(marks):
            kept = found[place]
            if not isinstance(kept, DynexportError) and len(kept) < len(tokens[place]):
                ran = tokens[place][: len(kept)]
                keep_first(self._executor, cache, mark, ran, depths[place], decisions[place])
        return found


class Speculators:
    """A model's speculators, which keep what they have learned from one stream to the next."""

    def __init__(self) -> None:
        self._idle: dict[Speculation, Speculator] = {}

    @contextmanager
    def lent(self, executor: Executor, speculation: Speculation) -> Iterator[Speculator]:
        """Yield a speculator that no other stream uses meanwhile. Raises DynexportError as ``Speculator`` does."""
        found = self._idle.pop(speculation, None) or Speculator.of(executor, speculation)
        try:
            yield found
        finally:
            self._idle[speculation] = found


def taken(row: SpeculatedRow, logits: Array, draft: Draft = _NO_DRAFT) -> list[Piece] | DynexportError:
    """Let a row take its next tokens; return them, or the error of ``choose``.

    Args:
        row: the row.
        logits: float32 [1 + drafts, vocab], of its latest token and of its drafts.
        draft: the drafted tokens.
    """
    try:
        pieces = accept(row.request, logits, draft.tokens)
    except DynexportError as error:
        return error
    row.take(pieces)
    row.acceptance.add(len(draft.tokens), len(pieces) - 1, foreseen=draft.foreseen)
    return pieces


def accept(request: Request, logits: Array, drafts: Sequence[int]) -> list[Piece]:
    """Choose a request's next tokens, until one differs from its draft or ends the request.

    Args:
        request: the request, which takes the tokens.
        logits: float32 [1 + drafts, vocab], of its latest token and of its drafts.
        drafts: the drafted token ids.

    Raises:
        DynexportError: as for ``choose``.
    """
    pieces: list[Piece] = []
    for place in range(len(logits)):
        (choice,) = choose(logits[place : place + 1], [request.sampler])
        piece, draft = request.push(choice), drafts[place] if place < len(drafts) else None
        pieces.append(piece if draft is None else replace(piece, draft=draft))
        differs = choice.token != draft
        if differs or pieces[-1].finish_reason is not None:
            break
    return pieces


__all__ = [
    "DRAFT",
    "MOST_DRAFTS",
    "Draft",
    "SpeculatedRow",
    "Speculation",
    "Speculator",
    "Speculators",
    "accept",
    "depth_of_layers",
    "runs_any_layers",
    "taken",
]
