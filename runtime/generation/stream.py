"""Run requests to their end: prompts, then decode steps of the rows that have not ended."""

from __future__ import annotations

import threading
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence

import numpy as np

from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.request import Piece, Request
from dynexport.runtime.generation.sampler import choose

Array = np.ndarray


class Stream(Iterator[Piece]):
    """The pieces of a generation as they come; every step runs when a piece of it is asked for.

    Several threads may take from it: each piece goes to one of them.
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
        """End it, after the step that another thread may be running; its cache can then be used by another stream."""
        self._closed = True  # those who wait for their turn are not to take the next step
        with self._turn:
            self._pieces.close()


def run_requests(
    executor: Executor, cache: KvCache, prompts: Sequence[Array], requests: Sequence[Sequence[Request]]
) -> Steps[Piece, None, None]:
    """Yield tokens as they come, row by row within a step.

    Args:
        cache: its rows 0, 1, .. are acquired, one for every request, and take the prompts on top of what they hold.
        prompts: int64 [n] each.
        requests: of each prompt; several share what one of them has run.
    """
    with cache.streamed:
        live = [request for group in requests for request in group]
        logits = _run_prompts(executor, cache, prompts, requests)
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


def _run_prompts(
    executor: Executor, cache: KvCache, prompts: Sequence[Array], requests: Sequence[Sequence[Request]]
) -> Array:
    """Logits after the prompt of every request, float32 [requests, vocab]."""
    shared = not executor.limits.whole_prompts and not executor.limits.compete
    first = [group[: 1 if shared else None] for group in requests]
    runs = [(request, prompt) for group, prompt in zip(first, prompts, strict=True) for request in group]
    batch = Batch(
        [request.index for request, _ in runs],
        [prompt for _, prompt in runs],
        "prompt",
        [request.depth for request, _ in runs],
    )
    found = {request.index: row for (request, _), row in zip(runs, executor.run(cache, batch).logits, strict=True)}
    for group in requests:
        for other in group[1:] if shared else ():
            cache.copy_prefix(cache.mark(group[0].index), other.index)
            found[other.index] = found[group[0].index]
    return np.concatenate([found[request.index] for group in requests for request in group])


__all__ = ["Stream", "run_requests"]
