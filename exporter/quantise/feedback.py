"""GPTQ (arXiv 2210.17323): round a matrix column by column, and make up for each error in the columns that follow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.quantise.integers import FloatArray, Integers, in_blocks, rounded, search

# The mean of the diagonal times this is added to it. SmolLM2, 2,560 tokens: KL 0.132, with 0.01 KL 0.145.
_DAMPING = 0.1
# Columns whose errors are passed on together.
_TOGETHER = 128


def with_feedback(weight: FloatArray, moments: FloatArray, size: int) -> Integers:
    """Round a matrix W [N, K] so that the error of its products W x is small.

    Scales and zero points are those of ``search`` with the inputs' mean squares as importance. Columns with large
    inputs are rounded first.

    Args:
        weight: float32 [N, K], finite.
        moments: float32 [K, K], the sum of x x^T over inputs x.
        size: number of values in a block.
    """
    damped = _damped(moments)
    importance = np.diagonal(damped).astype(np.float32)
    grid = search(weight, size, importance)
    order = np.argsort(-importance, kind="stable")
    upper = _inverse_factor(damped[np.ix_(order, order)])
    left = np.ascontiguousarray(weight.T[order])  # [K, N]: a column of the matrix is a row here
    scales, zeros = np.ascontiguousarray(grid.scale.T), grid.zero.T.astype(np.float32)
    q = in_blocks(np.zeros_like(weight), size).astype(np.uint8) + grid.zero[..., None]
    for start in range(0, len(order), _TOGETHER):
        stop = min(start + _TOGETHER, len(order))
        part, factor = left[start:stop], upper[start:stop, start:stop]
        errors = np.empty_like(part)
        for column in range(stop - start):
            block, place = divmod(order[start + column], size)
            integers = rounded(part[column], scales[block], zeros[block])
            q[:, block, place] = integers
            errors[column] = (part[column] - scales[block] * (integers - zeros[block])) / factor[column, column]
            part[column + 1 :] -= np.outer(factor[column, column + 1 :], errors[column])
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return Integers(q, grid.scale, grid.zero)


def _damped(moments: FloatArray) -> NDArray[np.float64]:
    """Return moments that can be inverted, scaled to a mean of the diagonal of 1 before damping."""
    damped, mean = moments.astype(np.float64), np.diagonal(moments).mean(dtype=np.float64)
    if mean > 0:
        damped /= mean
    damped[np.diag_indices_from(damped)] += _DAMPING if mean > 0 else 1
    return damped


def _inverse_factor(damped: NDArray[np.float64]) -> FloatArray:
    """Return the upper triangular U with U^T U = H^-1, for damped moments H."""
    # H = V V^T with an upper V is the lower factorisation of H with both axes reversed, and U is the inverse of V.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    inverse: NDArray[np.float64] = np.linalg.inv(lower)[::-1, ::-1]
    return inverse.astype(np.float32)


__all__ = ["with_feedback"]
