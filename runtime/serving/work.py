"""A submitted prompt with its answers, and what is delivered for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import Acceptance
from dynexport.runtime.generation.drafts import KnownTokens
from dynexport.runtime.generation.request import Piece, Request
from dynexport.runtime.generation.sampler import RowSampler

Array = np.ndarray
# Why a request ended without an answer.
Reason: TypeAlias = Literal["cancelled", "timeout", "failed", "closed"]


@dataclass(frozen=True)
class Failure:
    """The end of a request that has no answer, or not all of it.

    Attributes:
        reason: "cancelled" by the client, "timeout" after its deadline, "failed" in the engine or the router, "closed"
            when the server stops.
        message: one line for the client.
    """

    reason: Reason
    message: str


@dataclass(frozen=True)
class Answered:
    """One generated token of a request.

    Attributes:
        piece: the token and its text.
        layers: number of layers that the last token before it ran in, whose hidden state it was chosen from.
    """

    piece: Piece
    layers: int


@dataclass
class Delivery:
    """The tokens of one request that one step of the scheduler delivers.

    Attributes:
        work: the request.
        answered: the new tokens, in order.
        failure: set if the request ended without the rest of its answers.
        done: true for the last delivery.
    """

    work: Work
    answered: list[Answered] = field(default_factory=list)
    failure: Failure | None = None
    done: bool = False


@dataclass(eq=False)
class Work:
    """A submitted prompt and its answers.

    Attributes:
        prompt: token ids, int64 [n].
        requests: one per answer; they share one run of the prompt where the strategy allows it.
        new_tokens: most tokens of an answer.
        deliver: receives the deliveries, in the scheduler's thread; it must not block or raise.
        deadline: time.monotonic() after which it ends; None for no limit.
        arrived: time.monotonic() of its submission.
        cancelled: set by any thread to end it at the next step.
        reused: number of the prompt's tokens whose entries came from earlier requests; set before the first token.

    Raises:
        DynexportError: for a prompt without tokens.
    """

    prompt: Array
    requests: Sequence[Request]
    new_tokens: int
    deliver: Callable[[Delivery], None]
    deadline: float | None = None
    arrived: float = 0.0
    cancelled: bool = False
    reused: int = 0

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise DynexportError("prompt: expected at least one token, found none")

    @property
    def depth(self) -> Depth:
        """The depth of all its answers."""
        return self.requests[0].depth

    @property
    def reserved(self) -> int:
        """Tokens to reserve in the cache for all answers."""
        return len(self.requests) * (len(self.prompt) + self.new_tokens)


@dataclass(eq=False)
class Answer:
    """One answer of a running request, with its row in the cache.

    Attributes:
        work: the request that it belongs to.
        request: the state of its generation.
        row: its row in the cache.
        done: number of the prompt's tokens that have run.
        tokens: ids of the generated tokens; the last one has not run yet.
        ready: true if the prompt has run: decode steps may include it.
        chain: key of the last saved part of the row (see ``PrefixStore``); None if the chain has ended.
        saved: number of tokens in the saved parts.
        entries: int64 [places], number of entries of these tokens.
        latest: time.monotonic() of the latest token.
        known: its tokens, from which drafts are looked up; empty without speculation.
        acceptance: how many of its drafts were accepted.
        most_drafts: most drafts of its next step.
    """

    work: Work
    request: Request
    row: int
    entries: Array
    chain: bytes | None
    done: int = 0
    tokens: list[int] = field(default_factory=list)
    ready: bool = False
    saved: int = 0
    latest: float = 0.0
    known: KnownTokens = field(default_factory=KnownTokens)
    acceptance: Acceptance = field(default_factory=Acceptance)
    most_drafts: int = 0

    @property
    def depth(self) -> Depth:
        """The depth that it runs at."""
        return self.request.depth

    @property
    def sampler(self) -> RowSampler:
        """What chooses its tokens."""
        return self.request.sampler

    @property
    def token(self) -> int:
        """The id of its latest token, which has not run."""
        return self.tokens[-1]

    @property
    def left(self) -> int:
        """Number of the prompt's tokens that have not run."""
        return len(self.work.prompt) - self.done

    def token_ids(self, start: int, stop: int) -> Array:
        """Return the ids of its tokens from ``start`` to ``stop``, prompt and answer as one sequence, int64 [n]."""
        prompt = self.work.prompt
        generated = self.tokens[max(0, start - len(prompt)) : max(0, stop - len(prompt))]
        return np.concatenate([prompt[start:stop], np.array(generated, np.int64)])

    def take(self, pieces: Sequence[Piece]) -> None:
        """Take the tokens of a step."""
        for piece in pieces:
            self.tokens.append(piece.token)
            if self.known:
                self.known.push(piece.token)

    def layers(self, cache: KvCache, back: int) -> int:
        """Return the number of layers that a token ran in.

        Args:
            cache: the cache.
            back: 1 for the row's last token that has run, 2 for the one before it, ..
        """
        if cache.logs is not None:
            for decided in reversed(cache.logs[self.row]):
                if back <= decided.ran.shape[1]:
                    return int(decided.ran[:, -back].sum())
                back -= decided.ran.shape[1]
        return len(self.depth.keep if len(self.tokens) > 1 else self.depth.prompt)


__all__ = ["Answer", "Answered", "Delivery", "Failure", "Reason", "Work"]
