"""Log likelihood of given continuations, computed as a request runs: the context as a prompt, then generated tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.checks import checked_count, checked_ids
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import Tokens
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.generation.scoring import log_probabilities, predicted

Array = np.ndarray
# Most tokens of a continuation in one call, and most bytes of their logits.
CHUNK, _LOGITS = 64, 256 << 20


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
        chunk: the largest number of a continuation's tokens in one call.
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
    chunk = max(1, min(chunk, _LOGITS // (4 * executor.manifest.model.vocab_size * len(pairs))))
    sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
    for row, logits, targets in predicted(executor, cache, pairs, depth, chunk):
        sums[row] += float(log_probabilities(logits, targets).sum())
        greedy[row] = greedy[row] and bool((logits.argmax(axis=-1) == targets).all())
    return [Likelihood(*each) for each in zip(sums, greedy, strict=True)]


__all__ = ["Likelihood", "likelihoods"]
