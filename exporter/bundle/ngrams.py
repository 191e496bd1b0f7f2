"""Learn from a text which token follows short token sequences, and how often the model will choose it.

Probabilities are those of interpolated absolute discounting (Chen & Goodman 1999): P(w | c) = max(n(c w) - d, 0) / n(c)
+ d v(c) / n(c) P(w | c without its first token), where v(c) different tokens follow c. A sequence counts once in a
window: texts repeat themselves, and what a text has just said is looked up in itself. The probabilities are then
corrected by how often they came true in a fifth of the text that they were not learned from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.runtime.bundle.drafting import MOST_NGRAMS
from dynexport.runtime.bundle.ngrams import LONGEST_CONTEXT, PARTS, NgramTable, context_keys

Array = np.ndarray
_DISCOUNT = 0.8
# Entries below this are not worth their place, unless they correct a shorter context's.
_LEAST = 0.1
# A longer context that says the same token is left out where its probability differs by less.
_NEAR = 0.05
# The text is cut into this many runs of windows, of which every fifth is held out.
_RUNS, _HELD_OUT, _BINS = 25, 5, 12


@dataclass(frozen=True)
class Learned:
    """A table and the share of its drafts that are expected to be accepted, in 0..1."""

    table: NgramTable
    acceptance: float


@dataclass(frozen=True)
class _Level:
    """The likeliest next token of every context of one length.

    Attributes:
        keys: uint64 [contexts], ascending.
        tokens: int64 [contexts], the likeliest next token of each.
        chances: float64 [contexts], its probability.
        counts: int64 [contexts], in how many places a token follows.
        shorter: int64 [contexts], the place of the context without its first token in the level before.
    """

    keys: Array
    tokens: Array
    chances: Array
    counts: Array
    shorter: Array


def learn_ngrams(windows: Sequence[Array], most: int = MOST_NGRAMS) -> Learned | None:
    """Return a table of what follows short sequences of a text's tokens; None where nothing can be foreseen.

    Args:
        windows: parts of the text, int64 [n] each; a sequence is counted once in each.
        most: most entries of the table: the likeliest to be right.
    """
    run = np.arange(len(windows)) * _RUNS // max(1, len(windows)) if len(windows) > _RUNS else np.arange(len(windows))
    held = run % _HELD_OUT == _HELD_OUT // 2
    expected, real = _came_true(
        _levels([ids for ids, out in zip(windows, held, strict=True) if not out]),
        [ids for ids, out in zip(windows, held, strict=True) if out],
    )
    at, means = _correction(expected, real)
    corrected = np.interp(expected, at, means)
    drafted = corrected >= _LEAST
    levels = [
        _Level(level.keys, level.tokens, np.interp(level.chances, at, means), level.counts, level.shorter)
        for level in _levels(windows)
    ]
    table = _stored(levels, most)
    return None if table is None else Learned(table, float(real[drafted].mean()) if drafted.any() else 0.0)


def _levels(windows: Sequence[Array]) -> list[_Level]:
    """Return the likeliest next tokens of contexts of 0, 1, .. tokens, a level for each length."""
    if not windows or not sum(map(len, windows)):
        return []
    ids = np.concatenate(windows)
    window = np.repeat(np.arange(len(windows)), [len(each) for each in windows])
    start = np.repeat(np.cumsum([0, *map(len, windows[:-1])]), [len(each) for each in windows])
    before = np.arange(len(ids)) - start
    levels: list[_Level] = []
    chance, context_at = np.zeros(len(ids)), np.zeros(len(ids), np.int64)
    for length in range(LONGEST_CONTEXT + 1):
        places = np.flatnonzero(before >= length)
        if not places.size:
            break
        contexts = ids[places[:, None] - np.arange(length, 0, -1)] if length else np.zeros((len(places), 0), np.int64)
        keys, first, context = np.unique(context_keys(contexts), return_index=True, return_inverse=True)
        shorter = context_at[places][first]
        pair, of_place = _pairs(context, ids[places])
        counts = _once_a_window(of_place, window[places], len(pair))
        total = np.bincount(context[pair], counts, len(keys))
        follow = np.bincount(context[pair], minlength=len(keys))
        rest = _DISCOUNT * follow / total
        chances = np.maximum(counts - _DISCOUNT, 0) / total[context[pair]] + rest[context[pair]] * chance[places][pair]
        order = np.lexsort((chances, context[pair]))
        last = np.flatnonzero(np.append(np.diff(context[pair][order]) != 0, True))
        tokens, best = ids[places][pair][order][last], chances[order][last]
        if levels:
            low, low_best = levels[-1].tokens[shorter], rest * levels[-1].chances[shorter]
            tokens, best = np.where(low_best > best, low, tokens), np.maximum(best, low_best)
        levels.append(_Level(keys, tokens, best, total.astype(np.int64), shorter))
        chance[places], context_at[places] = chances[of_place], context
    return levels


def _pairs(contexts: Array, following: Array) -> tuple[Array, Array]:
    """Return a place of each pair of a context and its next token, and the index of each place's pair."""
    both = contexts.astype(np.int64) * (int(following.max()) + 1) + following
    _, first, of_place = np.unique(both, return_index=True, return_inverse=True)
    return first, of_place


def _once_a_window(pairs: Array, windows: Array, count: int) -> Array:
    """Return in how many windows each of ``count`` pairs stands."""
    return np.bincount(np.unique(windows * np.int64(count) + pairs) % count, minlength=count)


def _came_true(levels: Sequence[_Level], windows: Sequence[Array]) -> tuple[Array, Array]:
    """Return the probability of each token that the levels foresee in some windows, and whether it stood there."""
    expected: list[Array] = [np.zeros(0)]
    real: list[Array] = [np.zeros(0, bool)]
    for ids in windows:
        chances, right = np.full(len(ids), -1.0), np.zeros(len(ids), bool)
        for length, level in enumerate(levels[1:], 1):
            places = np.arange(length, len(ids))
            keys = context_keys(ids[places[:, None] - np.arange(length, 0, -1)])
            found = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
            known = level.keys[found] == keys
            places, found = places[known], found[known]
            chances[places], right[places] = level.chances[found], level.tokens[found] == ids[places]
        expected.append(chances[chances >= 0])
        real.append(right[chances >= 0])
    return np.concatenate(expected), np.concatenate(real)


def _correction(expected: Array, real: Array) -> tuple[Array, Array]:
    """Return points of a line that rises from what was expected to what came true, by bins of equally many tokens."""
    if not expected.size:
        return np.array([0.0, 1.0]), np.array([0.0, 1.0])
    order = np.argsort(expected, kind="stable")
    bins = [part for part in np.array_split(order, _BINS) if part.size]
    means = [float(real[part].mean()) for part in bins]
    return np.array([expected[part].mean() for part in bins]), np.maximum.accumulate(means)


def _stored(levels: Sequence[_Level], most: int) -> NgramTable | None:
    """Return the table of the contexts whose longest shorter one does not say the same."""
    keys, tokens, chances, uses = [], [], [], []
    said, sure, known = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, bool)
    for level in levels[1:]:
        low, low_sure, low_known = said[level.shorter], sure[level.shorter], known[level.shorter]
        same = low_known & (low == level.tokens) & (np.abs(low_sure - level.chances) < _NEAR)
        kept = ~same & (low_known | (level.chances >= _LEAST))
        said, sure = np.where(kept, level.tokens, low), np.where(kept, level.chances, low_sure)
        known = kept | low_known
        keys.append(level.keys[kept])
        tokens.append(level.tokens[kept])
        chances.append(level.chances[kept])
        uses.append(level.counts[kept] * level.chances[kept])
    if not sum(map(len, keys)):
        return None
    by_use = np.argsort(-np.concatenate(uses), kind="stable")[:most]
    chosen, places = np.unique(np.concatenate(keys)[by_use], return_index=True)
    parts = np.clip(np.rint(np.concatenate(chances)[by_use][places] * PARTS), 1, PARTS)
    return NgramTable(chosen, np.concatenate(tokens)[by_use][places], parts)


__all__ = ["Learned", "learn_ngrams"]
