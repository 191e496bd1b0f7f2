"""How far logits are from other logits: figures only, no judgement (thresholds.py has that)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.reference import RowPaths, RowRoutes

Routes: TypeAlias = RowRoutes | RowPaths
FloatArray: TypeAlias = NDArray[np.float32]
Metric: TypeAlias = (
    bool | int | float | str | list[int] | list[str] | list[float] | list[float | None] | list[list[int]] | None
)
Metrics: TypeAlias = dict[str, Metric]


def compare_logits(reference: Sequence[FloatArray], candidate: Sequence[FloatArray]) -> Metrics:
    """Compare logits position by position.

    Args:
        reference: per row float32 [n, vocab]; n may differ from row to row.
        candidate: of the same shapes.

    Returns:
        ``positions``; ``max_abs``, ``mean_abs`` error; ``spread``, the standard deviation of the reference's logits
        over the vocabulary, averaged over positions; ``max_relative``, the largest error in units of it;
        ``mean_kl``, ``max_kl`` of KL(reference || candidate) in nats; ``agreed``, positions where both have the same
        largest logit, and ``top1_agreement``, their share. Of each position where they differ:
        ``disagreements`` [row, position] and ``margins``, by how much the reference prefers its own choice to the
        candidate's. ``first_divergence`` per row, -1 where there is none. Errors are infinite where the candidate
        has NaN or infinity. Where there is no position, there are no other figures.
    """
    if not sum(map(len, reference)):
        return {"positions": 0, "agreed": 0, "max_abs": float("inf")}
    rows = [_compare_row(r, c) for r, c in zip(reference, candidate, strict=True)]
    errors, spreads, divergences = (np.concatenate(parts) for parts in zip(*(row[:3] for row in rows), strict=True))
    margins = [row[3] for row in rows]
    differing = [np.flatnonzero(~np.isnan(row)) for row in margins]
    spread = float(spreads.mean())
    max_abs = float(errors[:, 0].max())
    disagreements = [[i, int(position)] for i, positions in enumerate(differing) for position in positions]
    agreed = len(errors) - len(disagreements)
    return {
        "positions": len(errors),
        "max_abs": max_abs,
        "mean_abs": float(errors[:, 1].mean()),
        "spread": spread,
        "max_relative": max_abs / spread if spread else float(max_abs and np.inf),
        "mean_kl": float(divergences.mean()),
        "max_kl": float(divergences.max()),
        "agreed": agreed,
        "top1_agreement": agreed / len(errors),
        "disagreements": disagreements,
        "margins": [float(margins[row][position]) for row, position in disagreements],
        "first_divergence": [int(positions[0]) if len(positions) else -1 for positions in differing],
    }


def compare_bits(expected: Sequence[FloatArray], found: Sequence[FloatArray]) -> Metrics:
    """Whether logits are the same to the last bit: ``identical``, ``positions`` and ``max_abs`` (infinite for NaN)."""
    pairs = list(zip(expected, found, strict=True))
    return {
        "identical": bool(pairs) and all(len(a) and np.array_equal(a, b) for a, b in pairs),
        "positions": sum(len(a) for a, _ in pairs),
        "max_abs": max((float(_absolute_error(a, b).max(initial=0.0)) for a, b in pairs), default=float("inf")),
    }


def compare_routes(reference: Sequence[Routes], candidate: Sequence[Routes]) -> Metrics:
    """Compare what routers decided.

    A decision follows from the ones before it: in earlier layers or steps, of the same and earlier tokens, and through
    a full cache in the same layer of earlier tokens. So only a flip with no flip before it is one of its own.

    Args:
        reference: per row R x n decisions, R layers or steps; n may differ from row to row.
        candidate: of the same shapes.

    Returns:
        ``decisions``; ``agreed``, ``agreement``; of flips of their own ``flips`` [row, routed layer, token] and
        ``flip_margins``, how near the reference was to deciding the same; ``followed``, flips that follow from those;
        ``smallest_margin`` and ``mean_margin``, of those that had two choices; ``overflow`` and
        ``overflow_reference``, tokens that found a cache full, and ``overflow_differs``, the layers where these are
        not as many; ``share`` of decisions to run; ``max_score_error`` before the first flip of a row, infinite
        where a score is no number. Where there are no decisions, there are no other figures.
    """
    if not sum(row.decisions.size for row in reference):
        return {"decisions": 0, "agreed": 0, "flips": []}
    flips: list[list[int]] = []
    margins: list[float] = []
    errors = [0.0]
    differing = 0
    for row, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        flipped = expected.decisions != found.decisions
        before = np.cumsum(np.cumsum(flipped, axis=0), axis=1)  # those in earlier or the same layers and tokens
        differing += int(flipped.sum())
        for layer, token in np.argwhere(flipped & (before == 1)):
            flips.append([row, int(layer), int(token)])
            margins.append(float(expected.margin[layer, token]))
        error = _absolute_error(expected.score, found.score)
        errors.append(float(error[before == 0].max(initial=0.0)))
    decisions = sum(row.decisions.size for row in reference)
    decided = np.concatenate([row.margin[np.isfinite(row.margin)] for row in reference])
    return {
        "decisions": decisions,
        "agreed": decisions - differing,
        "agreement": 1 - differing / decisions,
        "flips": flips,
        "flip_margins": margins,
        "followed": differing - len(flips),
        "smallest_margin": min(float(row.margin.min()) for row in reference),
        "mean_margin": float(decided.mean()) if len(decided) else 0.0,
        "overflow": sum(int(row.overflow.sum()) for row in candidate),
        "overflow_reference": sum(int(row.overflow.sum()) for row in reference),
        "overflow_differs": _overflow_differs(reference, candidate),
        "share": sum(row.runs for row in candidate) / decisions,
        "max_score_error": max(errors),
    }


def _overflow_differs(reference: Sequence[Routes], candidate: Sequence[Routes]) -> list[int]:
    expected, found = (np.sum([row.overflow for row in rows], axis=0) for rows in (reference, candidate))
    return [int(place) for place in np.flatnonzero(expected != found)]


def number(metric: object) -> float:
    """A metric that is a number, as one; infinity for the null that stands for it in a saved report."""
    return float(metric) if isinstance(metric, int | float) else float("inf")


def relative_error(reference: FloatArray, candidate: FloatArray) -> float:
    """The largest ||candidate - reference|| / ||reference|| of any vector; both float32 [..., size]."""
    error = np.linalg.norm(_absolute_error(reference, candidate), axis=-1)
    size = np.linalg.norm(reference.astype(np.float64), axis=-1)
    return float((error / np.maximum(size, np.finfo(np.float32).tiny)).max())


def _compare_row(
    reference: FloatArray, candidate: FloatArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Of one row's positions: (max, mean) error [n, 2], spread [n], KL [n], margin [n], NaN where both agree.

    Position by position: float64 of all of them at once is large for large vocabularies.
    """
    found = [_compare_position(r, c) for r, c in zip(reference, candidate, strict=True)]
    table = np.array(found, np.float64).reshape(-1, 5)
    return table[:, :2], table[:, 2], table[:, 3], table[:, 4]


def _compare_position(reference: FloatArray, candidate: FloatArray) -> tuple[float, float, float, float, float]:
    error = _absolute_error(reference, candidate)
    wide = reference.astype(np.float64)
    best, chosen = int(reference.argmax()), int(candidate.argmax())
    margin = float(wide[best] - wide[chosen]) if best != chosen else np.nan
    return float(error.max()), float(error.mean()), float(wide.std()), _divergence(wide, candidate), margin


def _divergence(reference: NDArray[np.float64], candidate: FloatArray) -> float:
    if not np.isfinite(candidate).all():
        return float("inf")
    log_p, log_q = _log_softmax(reference), _log_softmax(candidate.astype(np.float64))
    # Rounding can bring the sum of equal distributions a little below its bound.
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _absolute_error(reference: FloatArray, candidate: FloatArray) -> NDArray[np.float64]:
    error = np.abs(candidate.astype(np.float64) - reference)
    return np.where(np.isfinite(candidate), error, np.inf)
