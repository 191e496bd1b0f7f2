"""Log likelihood of given continuations, computed as a request runs: the context as a prompt, then generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_ids
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import CHUNK, Batch, Tokens
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

Array = np.ndarray
# Most bytes of logits in memory.
_LOGITS = 256 << 20


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a continuation.

    Attributes:
        log_likelihood: sum over its tokens of the natural logarithm of their probabilities; 0 without tokens.
        greedy: true if each of its tokens is the most probable one.
    """

    log_likelihood: float
    greedy: bool


def likelihoods(
    executor: Executor,
    pairs: Sequence[tuple[Tokens, Tokens]],
    *,
    depth: Depth,
    rows: int = 8,
    chunk: int = CHUNK,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Likelihood]:
    """Return the likelihood of each continuation after its context.

    A context runs as a prompt, as a whole where top-k routes it. A continuation runs as generated tokens, in the layers
    that decode steps run, several tokens in a call where the graphs allow that.

    Args:
        executor: runs the bundle.
        pairs: token ids of contexts, each with at least one, and of continuations.
        depth: the depth of all tokens.
        rows: most pairs that run together; it does not change the results beyond rounding.
        chunk: the largest number of a row's tokens in one call.
        progress: called with the number of pairs done since the last call.

    Returns:
        One per pair, in the order of the pairs.

    Raises:
        DynexportError: for an empty context, a pair that exceeds the model's context, or invalid token ids.
    """
    rows = min(checked_count("rows", rows), executor.limits.rows or rows)
    vocabulary, most = executor.manifest.model.vocab_size, executor.manifest.model.max_length
    ids = [(checked_ids("context", a, vocabulary), _continuation(b, vocabulary)) for a, b in pairs]
    for number, (context, continuation) in enumerate(ids):
        # The last token is predicted and does not run.
        if not 1 <= len(context) <= most - max(0, len(continuation) - 1):
            raise DynexportError(
                f"pair {number}: expected 1 to {most} tokens without the last, found {len(context)} and "
                f"{len(continuation)}"
            )
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(ids)
    # Pairs of similar length run together, the longest first: memory that is too small shows at the beginning.
    order = sorted((place for place in range(len(ids)) if len(ids[place][1])), key=lambda place: _length(ids[place]))
    progress(len(ids) - len(order))
    for start in range(len(order), 0, -rows):
        places = order[max(0, start - rows) : start]
        for place, result in zip(places, _together(executor, [ids[p] for p in places], depth, chunk), strict=True):
            found[place] = result
        progress(len(places))
    return found


def _continuation(ids: Tokens, vocabulary: int) -> Array:
    return checked_ids("continuation", ids, vocabulary) if len(ids) else np.zeros(0, np.int64)


def _length(pair: tuple[Array, Array]) -> int:
    return len(pair[0]) + len(pair[1])


def _together(executor: Executor, pairs: Sequence[tuple[Array, Array]], depth: Depth, chunk: int) -> list[Likelihood]:
    """Return the likelihoods of some pairs, a row of one cache each."""
    cache = executor.full_cache(len(pairs), max(map(_length, pairs)))
    logits = executor.prefill(cache, [context for context, _ in pairs], depth=depth, chunk=chunk)
    sums = [_Sum(continuation) for _, continuation in pairs]
    for row, values in enumerate(logits):
        sums[row].add(values)
    chunk = max(1, min(chunk, _LOGITS // (4 * executor.manifest.model.vocab_size * len(pairs))))
    while any(each.left for each in sums):
        _run_chunk(executor, cache, sums, depth, chunk)
    return [Likelihood(each.log_likelihood, each.greedy) for each in sums]


def _run_chunk(executor: Executor, cache: KvCache, sums: Sequence[_Sum], depth: Depth, chunk: int) -> None:
    """Run the next tokens of all continuations, and add the likelihoods of those that follow them."""
    rows = [row for row, each in enumerate(sums) if each.left]
    tokens = [sums[row].next(chunk) for row in rows]
    result = executor.run(cache, Batch(rows, tokens, "decode", depth, "all", chunk=chunk))
    for row, values in zip(rows, result.logits, strict=True):
        sums[row].add(values)


class _Sum:
    """The likelihood of the tokens of a continuation whose logits have been seen."""

    def __init__(self, ids: Array) -> None:
        self._ids, self._seen = ids, 0
        self.log_likelihood, self.greedy = 0.0, True

    @property
    def left(self) -> int:
        """Number of tokens whose logits have not been seen."""
        return len(self._ids) - self._seen

    def next(self, most: int) -> Array:
        """Return the next tokens to run, int64 [n]; the first is the last one whose logits have been seen."""
        return self._ids[self._seen - 1 : min(self._seen - 1 + most, len(self._ids) - 1)]

    def add(self, logits: Array) -> None:
        """Add the next tokens, by their logits, float32 [n, vocab]."""
        targets = self._ids[self._seen : self._seen + len(logits)]
        values = logits.astype(np.float64)
        top = values.max(axis=-1, keepdims=True)
        chosen = values[np.arange(len(targets)), targets]
        self.log_likelihood += float((chosen - top[:, 0] - np.log(np.exp(values - top).sum(axis=-1))).sum())
        self.greedy = self.greedy and bool((values.argmax(axis=-1) == targets).all())
        self._seen += len(targets)


__all__ = ["Likelihood", "likelihoods"]
