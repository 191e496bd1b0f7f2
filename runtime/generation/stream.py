"""Run requests to their end: prefill, then decode steps of the rows that have not ended."""

from __future__ import annotations

import threading
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.batch import CHUNK, Batch, EvenChunks, Tokens
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.draft_length import Acceptance
from dynexport.runtime.generation.drafts import KnownTokens
from dynexport.runtime.generation.request import Piece, Request
from dynexport.runtime.generation.sampler import choose
from dynexport.runtime.generation.speculation import Speculator, accept

Array = np.ndarray


class Stream(Iterator[Piece]):
    """An iterator over generated pieces; a step runs when its first piece is requested.

    Several threads may share a stream: each piece goes to one of them.
    """

    def __init__(self, pieces: Steps[Piece, None, None]) -> None:
        self._pieces = pieces
        self._turn = threading.Lock()
        self._closed = False

    def __next__(self) -> Piece:
        with self._turn:
            if self._closed:
                raise StopIteration
            return next(self._pieces)

    def close(self) -> None:
        """End the stream and release its cache; waits for a step that runs in another thread."""
        self._closed = True  # a thread that waits in __next__ must not run another step
        with self._turn:
            self._pieces.close()


def run_requests(
    executor: Executor,
    cache: KvCache,
    prompts: Sequence[Array],
    requests: Sequence[Sequence[Request]],
    chunk: int | EvenChunks = CHUNK,
    *,
    speculator: AbstractContextManager[Speculator] | None = None,
    held: Sequence[Tokens] = (),
) -> Steps[Piece, None, None]:
    """Yield tokens as they are generated, row by row within a step.

    Args:
        executor: runs the bundle's graphs.
        cache: a cache with one acquired row per request, 0, 1, ..; prompts follow the tokens that it holds.
        prompts: token ids, int64 [n] each.
        requests: the requests of each prompt; they share one run of the prompt where the strategy allows it.
        chunk: the largest number of a prompt's tokens in one call.
        speculator: drafts tokens; None for one token of a row in each step.
        held: the token ids that ``cache`` holds, per row, for drafts.
    """
    with cache.streamed:
        live = [request for group in requests for request in group]
        logits = _run_prompts(executor, cache, prompts, requests, chunk)
        if speculator is not None:
            texts = [prompt for prompt, group in zip(prompts, requests, strict=True) for _ in group]
            before = list(held) or [()] * len(texts)
            seen = [[*first, *text] for first, text in zip(before, texts, strict=True)]
            with speculator as lent:
                yield from _speculated(lent, cache, live, seen, logits)
            return
        while True:
            going = []
            for request, choice in zip(live, choose(logits, [request.sampler for request in live]), strict=True):
                piece = request.push(choice)
                if piece.finish_reason is None:
                    going.append((request, choice.token))
                yield piece
            if not going:
                return
            live = [request for request, _ in going]
            rows, depths = [request.index for request in live], [request.depth for request in live]
            logits = executor.decode(cache, rows, [token for _, token in going], depths, lasting=False)


class _Row:
    """A request of this module that decodes with drafts; see ``SpeculatedRow``."""

    def __init__(
        self, request: Request, seen: Sequence[int], token: int, most_drafts: int, acceptance: Acceptance
    ) -> None:
        self.request, self.row, self.token, self.most_drafts = request, request.index, token, most_drafts
        self.depth, self.sampler = request.depth, request.sampler
        self.known, self.acceptance = KnownTokens([*seen, token]), acceptance

    def take(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.known.push(piece.token)
        self.token = pieces[-1].token


def _speculated(
    speculator: Speculator,
    cache: KvCache,
    requests: Sequence[Request],
    seen: Sequence[Sequence[int]],
    logits: Array,
) -> Steps[Piece, None, None]:
    """Yield tokens of decode steps with drafts, from the logits of the prompts, float32 [requests, vocab]."""
    live: list[_Row] = []
    for request, known, values in zip(requests, seen, logits, strict=True):
        (piece,) = accept(request, values[None], ())
        if piece.finish_reason is None:
            live.append(_Row(request, known, piece.token, speculator.most, speculator.acceptance()))
        yield piece
    while live:
        going = []
        for row, pieces in zip(live, speculator.step(cache, live), strict=True):
            if isinstance(pieces, DynexportError):
                raise pieces
            if pieces[-1].finish_reason is None:
                going.append(row)
            yield from pieces
        live = going


def _run_prompts(
    executor: Executor,
    cache: KvCache,
    prompts: Sequence[Array],
    requests: Sequence[Sequence[Request]],
    chunk: int | EvenChunks,
) -> Array:
    """Run the prompts and return the last token's logits of every request, float32 [requests, vocab]."""
    shared = not executor.limits.whole_prompts and not executor.limits.compete
    first = [group[: 1 if shared else None] for group in requests]
    runs = [(request, prompt) for group, prompt in zip(first, prompts, strict=True) for request in group]
    batch = Batch(
        [request.index for request, _ in runs],
        [prompt for _, prompt in runs],
        "prompt",
        [request.depth for request, _ in runs],
        chunk=chunk,
    )
    found = {request.index: row for (request, _), row in zip(runs, executor.run(cache, batch).logits, strict=True)}
    for group in requests:
        for other in group[1:] if shared else ():
            cache.copy_prefix(cache.mark(group[0].index), other.index)
            found[other.index] = found[group[0].index]
    return np.concatenate([found[request.index] for group in requests for request in group])


__all__ = ["Stream", "run_requests"]
