"""Run requests to their end: prefill, then decode steps of the rows that have not ended."""

from __future__ import annotations

import threading
from collections.abc import Generator as Steps
from collections.abc import Iterator, Sequence

import numpy as np

from dynexport.runtime.execution.batch import CHUNK, Batch, EvenChunks
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.request import Piece, Request
from dynexport.runtime.generation.sampler import choose

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
) -> Steps[Piece, None, None]:
    """Yield tokens as they are generated, row by row within a step.

    Args:
        executor: runs the bundle's graphs.
        cache: a cache with one acquired row per request, 0, 1, ..; prompts follow the tokens that it holds.
        prompts: token ids, int64 [n] each.
        requests: the requests of each prompt; they share one run of the prompt where the strategy allows it.
        chunk: the largest number of a prompt's tokens in one call.
    """
    with cache.streamed:
        live = [request for group in requests for request in group]
        logits = _run_prompts(executor, cache, prompts, requests, chunk)
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
