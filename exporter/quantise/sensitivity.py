"""Measure what the products of a matrix lose in 4 bits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.quantise.integers import FloatArray, search


def lost_products(
    weight: FloatArray, moments: FloatArray, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the squared errors of products W x with a matrix W [N, K] in 4 bits, and the squared products.

    Args:
        weight: float32 [N, K], finite.
        moments: float32 [K, K], the sum of x x^T over inputs x.
        size: number of values in a block.

    Returns:
        Sums over the inputs for every row, float64 [N] each.
    """
    found = search(weight, size, np.diagonal(moments))
    values = found.scale[..., None] * (found.q.astype(np.float32) - found.zero[..., None])
    errors = weight - values.reshape(len(weight), -1)[:, : weight.shape[1]]
    lost, whole = (np.einsum("nk,nk->n", rows @ moments, rows, dtype=np.float64) for rows in (errors, weight))
    return lost, whole


__all__ = ["lost_products"]
