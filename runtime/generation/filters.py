"""Draw a token from a row of logits: the filtered distribution, and a fast way to draw from it.

``distribution`` is the definition, in float64 over the whole row. ``draw`` computes softmax in float32 (sums in
float64), as transformers and vLLM do. Its probabilities differ by about 1e-7, so about one draw in 10,000 gives another
token than the definition.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.generation.sampling import Sampling

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]
Weights = NDArray[np.float64]

# Shorter rows use the definition, which is as fast for them.
_SHORT = 4096
_BLOCK = 64
# top_p searches first among tokens with at least 1/4096, then 1/16384, of the probability that it leaves out.
_PARTS = (4096, 16384)
# The second search pays if the first one found at least this share of top_p.
_NEARLY = 0.9
# Float32 can divide by temperatures from _COLDEST to _HOTTEST.
_COLDEST, _HOTTEST = 1e-6, 1e6


def distribution(row: Logits, sampling: Sampling) -> tuple[Ids, Weights]:
    """Return the filtered distribution of a row's token, computed in float64.

    Args:
        row: logits [vocab]; the largest is finite.
        sampling: options with a temperature above 0.

    Returns:
        Token ids, ascending, and each one's probability, normalized over the tokens that ``top_k`` keeps.
    """
    ids = _top_k(row, sampling.top_k)
    exact = row[ids].astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature gives minus infinity, which is intended
        weights = np.exp((exact - exact.max()) / sampling.temperature)
    probabilities = weights / weights.sum()
    if sampling.top_p < 1:
        kept = _largest(probabilities, *_smallest_set(probabilities, sampling.top_p))
        ids, probabilities = ids[kept], probabilities[kept]
    if sampling.min_p > 0:
        likely = probabilities >= sampling.min_p * probabilities.max()
        ids, probabilities = ids[likely], probabilities[likely]
    if sampling.typical_p < 1:
        typical = _typical(probabilities / probabilities.sum(), sampling.typical_p)
        ids, probabilities = ids[typical], probabilities[typical]
    return ids, probabilities


def draw(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int:
    """Draw a token from ``distribution(row, sampling)``.

    Args:
        row: logits [vocab].
        largest: the row's largest logit, finite.
        sampling: options with a temperature above 0.
        uniform: the random number in [0, 1) that selects the token.
    """
    small = row.size < _SHORT or sampling.top_k > 0
    if small or sampling.typical_p < 1 or not _COLDEST <= sampling.temperature <= _HOTTEST:
        return _pick(*distribution(row, sampling), uniform)
    if sampling.top_p < 1:
        return _draw_top_p(row, largest, sampling, uniform)
    if sampling.min_p > 0:
        # min_p is a threshold on logits; take a few more tokens, and distribution() decides near the threshold.
        edge = largest + sampling.temperature * float(np.log(sampling.min_p))
        near = np.flatnonzero(row >= edge - 1e-5 * (1 + abs(edge)))
        ids, probabilities = distribution(row[near], sampling)
        return _pick(near[ids], probabilities, uniform)
    return _draw_from_all(_weights(row, largest, sampling.temperature), uniform)


def largest_ids(row: Logits, count: int) -> Ids:
    """Return the ids of the ``count`` largest logits, largest first; among equal logits, the lowest id first."""
    ids = _top_k(row, count)
    return ids[np.argsort(-row[ids], kind="stable")]


def log_of_sum(row: Logits, largest: float) -> float:
    """Return log(sum(exp(logits))) of a row [vocab] whose largest logit is finite; its error is below 1e-5."""
    return largest + float(np.log(_block_sums(_weights(row, largest, 1.0)).sum(dtype=np.float64)))


def _top_k(row: Logits, count: int) -> Ids:
    """Return the ids of the ``count`` largest logits, ascending; lower ids win ties; 0 returns all ids."""
    if count == 0 or count >= row.size:
        return np.arange(row.size)
    ids = _reaching(row, count)
    values = row[ids]
    return ids[_largest(values, np.partition(values, -count)[-count], count)]


def _reaching(row: Logits, count: int) -> Ids:
    """Return a superset of the ids of the ``count`` largest logits and their ties, ascending."""
    # At least count tokens reach the count-th largest of the largest logits of groups, and rarely many more.
    groups = row.size // _BLOCK
    if count > groups // 2:
        return np.flatnonzero(row >= np.partition(row, -count)[-count])
    maxima = row[: groups * _BLOCK].reshape(_BLOCK, groups).max(axis=0)
    return np.flatnonzero(row >= np.partition(maxima, -count)[-count])


def _largest(values: NDArray[np.floating], edge: np.floating, count: int) -> NDArray[np.bool_]:
    """Return the mask of the ``count`` largest values; ``edge`` is the smallest of them, and the first win ties."""
    marked = np.asarray(values >= edge)
    surplus = np.count_nonzero(marked) - count
    if surplus:
        marked[np.flatnonzero(values == edge)[-surplus:]] = False
    return marked


def _typical(probabilities: Weights, mass: float) -> NDArray[np.bool_]:
    """Return the mask of the tokens nearest to the entropy that reach ``mass`` (Meister et al. 2022)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        distances = np.abs(information - np.nansum(information * probabilities))
    order = np.argsort(distances, kind="stable")
    reached = int(np.cumsum(probabilities[order]).searchsorted(mass))
    return np.asarray(distances <= distances[order[min(reached, len(order) - 1)]])


def _weights(row: Logits, largest: float, temperature: float) -> Logits:
    """Return exp((logit - largest) / temperature) in float32, padded with zeros to a whole number of blocks."""
    weights = np.empty(-(-row.size // _BLOCK) * _BLOCK, np.float32)
    weights[row.size :] = 0
    part = weights[: row.size]
    np.subtract(row, np.float32(largest), out=part)
    if temperature != 1:
        np.divide(part, np.float32(temperature), out=part)
    np.exp(part, out=part)
    return weights


def _block_sums(weights: Logits) -> Logits:
    """Return the sums of blocks of 64 weights; float32 is exact enough for 64 values."""
    return np.asarray(np.einsum("ij->i", weights.reshape(-1, _BLOCK)))


def _smallest_set(weights: NDArray[np.floating], wanted: float) -> tuple[np.floating, int]:
    """Return the last weight and the size, at least 1, of the shortest descending prefix that sums to ``wanted``."""
    descending = np.sort(weights)[::-1]
    reached = int(descending.astype(np.float64).cumsum().searchsorted(wanted))
    reached = min(reached, len(weights) - 1)
    return descending[reached], reached + 1


def _draw_top_p(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int:
    weights = _weights(row, largest, sampling.temperature)
    total = float(_block_sums(weights).sum(dtype=np.float64))
    wanted = sampling.top_p * total
    for parts in _PARTS:
        ids = np.flatnonzero(weights >= (total - wanted) / parts)
        values = weights[ids]
        found = values.sum(dtype=np.float64)
        if found > wanted:
            kept = _largest(values, *_smallest_set(values, wanted))
            if sampling.min_p > 0:
                kept &= values >= sampling.min_p
            return _pick(ids[kept], values[kept].astype(np.float64), uniform)
        if found < _NEARLY * wanted:
            break
    # Rare: most of the vocabulary is needed.
    weights *= _largest(weights, *_smallest_set(weights, wanted))
    weights *= weights >= sampling.min_p  # the largest weight is 1
    return _draw_from_all(weights, uniform)


def _pick(ids: Ids, weights: Weights, uniform: float) -> int:
    cumulative = weights.cumsum()
    cumulative /= cumulative[-1]  # the last is then exactly 1, above every draw
    return int(ids[cumulative.searchsorted(uniform, side="right")])


def _draw_from_all(weights: Logits, uniform: float) -> int:
    """Return the first index whose cumulative share exceeds ``uniform``; the search is by block, then inside it."""
    cumulative = _block_sums(weights).astype(np.float64).cumsum()
    total = float(cumulative[-1])
    cumulative /= total
    block = int(cumulative.searchsorted(uniform, side="right"))
    before = float(cumulative[block - 1]) if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64).cumsum()
    # Rounding can put the target at or beyond the block's end; the block's last token is right then.
    target = min((uniform - before) * total, float(np.nextafter(inside[-1], 0)))
    return block * _BLOCK + int(inside.searchsorted(target, side="right"))


__all__ = ["distribution", "draw", "largest_ids", "log_of_sum"]
