"""Draw a token from a row of logits: the distribution that the filters leave, and fast ways to the same draw.

``distribution`` is the definition, in float64 over the whole row. ``draw`` gives the same token without it: float32
decides only where its rounding cannot matter, and float64 decides the rest. So a draw does not depend on which of both
was used, nor on how a processor rounds float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.generation.sampling import Sampling

Logits = NDArray[np.float32]
Ids = NDArray[np.intp]
Weights = NDArray[np.float64]

# Rows shorter than this are drawn from by definition: that is as fast.
_SHORT = 4096
_BLOCK = 64
# Candidates that top_p begins with: what it keeps of a trained model's distribution is rarely more.
_FEW = 128
# Bound of the error of a share of softmax computed in float32. With d = (logit - largest) / temperature, E|d| is at most
# log(vocab), about 12, and d is rounded three times: 3 * 12 * 2**-24. exp adds 2**-21, and sums of 64 values at most
# 64 * 2**-24. Together below 2**-17.
_DOUBT = 2.0**-17
# Float32 can divide by these.
_COLDEST, _HOTTEST = 1e-6, 1e6


def distribution(row: Logits, sampling: Sampling) -> tuple[Ids, Weights]:
    """Return what a row's token is drawn from, computed in float64.

    Args:
        row: [vocab], logits whose largest is finite.
        sampling: its temperature is above 0.

    Returns:
        Token ids, ascending, and the probability of each among all that ``top_k`` left.
    """
    ids = _top_k(row, sampling.top_k)
    values = row[ids]
    weights = _weights(values, float(values.max()), sampling.temperature)
    total = float(weights.sum())
    if sampling.top_p < 1:
        kept = _smallest_set(weights, sampling.top_p * total)
        ids, weights = ids[kept], weights[kept]
    return _less_likely_left_out(ids, weights / total, sampling)


def draw(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int:
    """Draw a token from ``distribution(row, sampling)``.

    Args:
        row: [vocab].
        largest: the row's largest logit, finite.
        sampling: its temperature is above 0.
        uniform: a number in [0, 1) that decides which.
    """
    found = _fast(row, largest, sampling, uniform)
    return _pick(*distribution(row, sampling), uniform) if found is None else found


def largest_ids(row: Logits, count: int) -> Ids:
    """Return the ids of the ``count`` largest logits, the largest first, of equal ones the lowest ids first."""
    ids = _top_k(row, count)
    return ids[np.argsort(-row[ids], kind="stable")]


def log_of_sum(row: Logits, largest: float) -> float:
    """Return log(sum(exp(logits))) of a row [vocab] whose largest logit is finite; its error is below 1e-5."""
    return largest + float(np.log(_block_sums(row, largest, 1.0).sum(dtype=np.float64)))


def _fast(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int | None:
    """Draw by float32 where it is certain; None otherwise."""
    if sampling.top_k or sampling.typical_p < 1 or not _COLDEST <= sampling.temperature <= _HOTTEST:
        return None  # top_k leaves few tokens: float64 is fast then
    if row.size < _SHORT:
        return None
    if sampling.top_p < 1:
        return _draw_top_p(row, largest, sampling, uniform)
    if sampling.min_p > 0:
        return _draw_min_p(row, largest, sampling, uniform)
    return _draw_from_all(row, largest, sampling.temperature, uniform)


def _draw_top_p(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int | None:
    ids = _reaching(row, _FEW)
    weights = _weights(row[ids], largest, sampling.temperature)
    total = float(_block_sums(row, largest, sampling.temperature).sum(dtype=np.float64))
    order = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[order]).searchsorted(
        [(sampling.top_p - _DOUBT) * total, (sampling.top_p + _DOUBT) * total], side="left"
    )
    fewest, most = reached.tolist()
    if most == len(ids) or fewest < most:
        return None
    kept = np.sort(order[: fewest + 1])
    return _pick(*_less_likely_left_out(ids[kept], weights[kept], sampling), uniform)


def _draw_min_p(row: Logits, largest: float, sampling: Sampling, uniform: float) -> int:
    # min_p of the largest probability is a distance of logits; the filter itself decides at the edge.
    edge = largest + sampling.temperature * float(np.log(sampling.min_p))
    ids = np.flatnonzero(row >= edge - 1e-5 * (1 + abs(edge)))
    weights = _weights(row[ids], largest, sampling.temperature)
    return _pick(*_less_likely_left_out(ids, weights, sampling), uniform)


def _draw_from_all(row: Logits, largest: float, temperature: float, uniform: float) -> int | None:
    """Find the block of 64 ids by float32 sums, then the token in it by float64."""
    cumulative = np.cumsum(_block_sums(row, largest, temperature), dtype=np.float64)
    target, doubt = uniform * cumulative[-1], _DOUBT * cumulative[-1]
    block = int(np.searchsorted(cumulative, target, side="right"))
    before = cumulative[block - 1] if block else 0.0
    inside = before + np.cumsum(_weights(row[block * _BLOCK : (block + 1) * _BLOCK], largest, temperature))
    place = int(np.searchsorted(inside, target, side="right"))
    if place == len(inside) or inside[place] - target <= doubt:
        return None
    if target - (inside[place - 1] if place else before) <= doubt:
        return None
    return block * _BLOCK + place


def _pick(ids: Ids, weights: Weights, uniform: float) -> int:
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]  # the last is then exactly 1, above every draw
    return int(ids[np.searchsorted(cumulative, uniform, side="right")])


def _less_likely_left_out(ids: Ids, weights: Weights, sampling: Sampling) -> tuple[Ids, Weights]:
    """Apply ``min_p`` and ``typical_p`` to ids and what is proportional to their probabilities."""
    if sampling.min_p > 0:
        likely = weights >= sampling.min_p * weights.max()
        ids, weights = ids[likely], weights[likely]
    if sampling.typical_p < 1:
        typical = _typical(weights / weights.sum(), sampling.typical_p)
        ids, weights = ids[typical], weights[typical]
    return ids, weights


def _typical(probabilities: Weights, mass: float) -> NDArray[np.bool_]:
    """Say which tokens stay: those up to the distance from the entropy at which ``mass`` is reached."""
    with np.errstate(divide="ignore", invalid="ignore"):
        information = -np.log(probabilities)
        distances = np.abs(information - np.nansum(information * probabilities))
    order = np.argsort(distances, kind="stable")
    reached = np.searchsorted(np.cumsum(probabilities[order]), mass, side="left")
    return np.asarray(distances <= distances[order[min(int(reached), len(order) - 1)]])


def _top_k(row: Logits, count: int) -> Ids:
    """Return the ids of the ``count`` largest logits, ascending; of equal ones the lowest ids; all when 0."""
    if count == 0 or count >= row.size:
        return np.arange(row.size)
    ids = _reaching(row, count)
    values = row[ids]
    return ids[_first_largest(values, np.partition(values, -count)[-count], count)]


def _smallest_set(weights: Weights, wanted: float) -> Ids:
    """Return places of the fewest largest weights that sum to ``wanted``, ascending; of equal ones the first; never none."""
    # Sorting weights without their places is ten times faster than with them.
    descending = np.sort(weights)[::-1]
    reached = min(int(np.searchsorted(np.cumsum(descending), wanted, side="left")), len(weights) - 1)
    return _first_largest(weights, descending[reached], reached + 1)


def _first_largest(values: NDArray[np.floating], edge: np.floating, count: int) -> Ids:
    """Return places of the ``count`` largest values, of which ``edge`` is the smallest; of equal ones the first."""
    larger = values > edge
    equal = np.flatnonzero(values == edge)[: count - np.count_nonzero(larger)]
    larger[equal] = True
    return np.flatnonzero(larger)


def _reaching(row: Logits, count: int) -> Ids:
    """Return ids, ascending, with all of the ``count`` largest logits and all equal to the smallest of these among them."""
    # The count-th largest of the largest logits of blocks is reached by at least count tokens, and rarely by many more.
    blocks = row.size // _BLOCK
    if count > blocks // 2:
        return np.flatnonzero(row >= np.partition(row, -count)[-count])
    maxima = row[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)
    return np.flatnonzero(row >= np.partition(maxima, -count)[-count])


def _block_sums(row: Logits, largest: float, temperature: float) -> NDArray[np.float32]:
    """Return the sums of exp((logit - largest) / temperature) over blocks of 64 ids, the last one maybe shorter."""
    blocks = -(-row.size // _BLOCK)
    weights = np.empty(blocks * _BLOCK, np.float32)
    weights[row.size :] = 0
    part = weights[: row.size]
    np.subtract(row, np.float32(largest), out=part)
    if temperature != 1:
        with np.errstate(over="ignore"):  # a tiny temperature sends the others to minus infinity, which is meant
            np.divide(part, np.float32(temperature), out=part)
    np.exp(part, out=part)
    return np.einsum("ij->i", weights.reshape(blocks, _BLOCK))


def _weights(values: Logits, largest: float, temperature: float) -> Weights:
    """Return exp((logit - largest) / temperature) in float64."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp((values.astype(np.float64) - largest) / temperature))


__all__ = ["distribution", "draw", "largest_ids", "log_of_sum"]
