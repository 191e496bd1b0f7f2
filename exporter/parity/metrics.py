"""Metrics of the difference between logits and between routing decisions; thresholds.py judges them."""

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
        candidate: per row float32 of the same shape.

    Returns:
        Metrics by name. ``positions`` is the number of compared positions; ``max_abs`` and ``mean_abs`` are the largest
        and mean error; ``spread`` is the standard deviation of the reference's logits over the vocabulary, mean over
        positions; ``max_relative`` is max_abs / spread; ``mean_kl`` and ``max_kl`` are KL(reference || candidate) in
        nats; ``agreed`` counts the positions where both have the same largest logit, ``top1_agreement`` is their share;
        ``disagreements`` has [row, position] of the others, and ``margins`` has, for each of these, the reference's
        largest logit minus its logit of the candidate's token; ``first_divergence`` is the first such position of every
        row, -1 without one. Errors are infinite where the candidate has NaN or infinity. Without positions, there are
        only ``positions``, ``agreed`` and ``max_abs``.
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
    """Compare logits bit by bit: return ``identical``, ``positions`` and ``max_abs`` (infinite for NaN)."""
    pairs = list(zip(expected, found, strict=True))
    return {
        "identical": bool(pairs) and all(len(a) and np.array_equal(a, b) for a, b in pairs),
        "positions": sum(len(a) for a, _ in pairs),
        "max_abs": max((float(_absolute_error(a, b).max(initial=0.0)) for a, b in pairs), default=float("inf")),
    }


def compare_routes(reference: Sequence[Routes], candidate: Sequence[Routes]) -> Metrics:
    """Compare routing decisions.

    A flip is a decision that differs. A decision depends on earlier decisions: those in earlier layers or hops for the
    same and earlier tokens, and, through a full cache, those in the same layer for earlier tokens. So a flip is
    independent only if no flip comes before it.

    Args:
        reference: per row R x n decisions, for R routed layers or hops and n tokens; n may differ from row to row.
        candidate: per row decisions of the same shape.

    Returns:
        Metrics by name. ``decisions`` is the number of compared decisions; ``agreed`` counts the equal ones,
        ``agreement`` is their share; ``flips`` has [row, routed layer or hop, token] of the independent flips, and
        ``flip_margins`` the reference's margin of each; ``followed`` counts the other flips; ``smallest_margin`` is the
        smallest margin, ``mean_margin`` the mean of the finite ones (decisions with more than one choice); ``overflow``
        and ``overflow_reference`` count the tokens that found a cache full, and ``overflow_differs`` has the indices of
        the routed layers where the two differ; ``share`` is the share of decisions to run a layer;
        ``max_score_error`` is the largest error of a score before a row's first flip, infinite for NaN and infinity.
        Without decisions, there are only ``decisions``, ``agreed`` and ``flips``.
    """
    if not sum(row.decisions.size for row in reference):
        return {"decisions": 0, "agreed": 0, "flips": []}
    flips: list[list[int]] = []
    margins: list[float] = []
    errors = [0.0]
    differing = 0
    for row, (expected, found) in enumerate(zip(reference, candidate, strict=True)):
        flipped = expected.decisions != found.decisions
        before = np.cumsum(np.cumsum(flipped, axis=0), axis=1)  # flips in earlier or the same layers and tokens
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
    """Return a metric as float; infinity for null, which replaces it in a saved report."""
    return float(metric) if isinstance(metric, int | float) else float("inf")


def relative_error(reference: FloatArray, candidate: FloatArray) -> float:
    """Return the largest ||candidate - reference|| / ||reference|| of a vector; both float32 [..., size]."""
    error = np.linalg.norm(_absolute_error(reference, candidate), axis=-1)
    size = np.linalg.norm(reference.astype(np.float64), axis=-1)
    return float((error / np.maximum(size, np.finfo(np.float32).tiny)).max())


def _compare_row(
    reference: FloatArray, candidate: FloatArray
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return a row's (max, mean) error [n, 2], spread [n], KL [n] and margin [n], NaN where the tokens agree.

    Positions are compared one by one: a whole row in float64 needs much memory for large vocabularies.
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
    # Rounding can make the sum slightly negative for equal distributions.
    return max(0.0, float((np.exp(log_p) * (log_p - log_q)).sum()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def _absolute_error(reference: FloatArray, candidate: FloatArray) -> NDArray[np.float64]:
    error = np.abs(candidate.astype(np.float64) - reference)
    return np.where(np.isfinite(candidate), error, np.inf)
