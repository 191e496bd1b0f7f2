"""A matrix as blocks of 4-bit integers, and the search for the scale and zero point of each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
LARGEST = 15
# Scales that are tried, as shares of the scale at which the integers cover a block's whole range.
_SHARES = (1.0, 1.03, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8)
# Values that are searched at a time: the arrays of one search stay in the processor's cache.
_VALUES_AT_ONCE = 1 << 17


@dataclass(frozen=True, eq=False)
class Integers:
    """A matrix [N, K]: weight[n, b * size + i] = scale[n, b] * (q[n, b, i] - zero[n, b]).

    The last block of a row may be longer than the row; what is beyond stands for 0.

    Attributes:
        q: uint8 [N, ceil(K / size), size], 0..15.
        scale: float32 [N, ceil(K / size)].
        zero: uint8 [N, ceil(K / size)], 0..15.
    """

    q: NDArray[np.uint8]
    scale: FloatArray
    zero: NDArray[np.uint8]


def search(weight: FloatArray, size: int, importance: FloatArray | None = None) -> Integers:
    """Round a matrix so that the squared error of every block is small.

    For several scales around that of the block's range, the integers are rounded, and the scale is then fitted to them
    by least squares; the best of them is taken.

    Args:
        weight: float32 [N, K], finite.
        size: number of values in a block.
        importance: float32 [K], weights of the columns' squared errors; None: all are equal.
    """
    blocks = in_blocks(weight, size)
    flat = blocks.reshape(-1, size)
    weights = None if importance is None else in_blocks(importance[None], size)[0]
    q, scale, zero = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32), np.empty(len(flat), np.uint8)
    for part in _parts(len(flat), size, blocks.shape[1]):
        values = flat[part]
        factors = None if weights is None else np.tile(weights, (len(values) // len(weights), 1))
        scale[part], found = grids(values, factors)
        zero[part] = found
        q[part] = rounded(values, scale[part, None], found[:, None])
    return Integers(q.reshape(blocks.shape), scale.reshape(blocks.shape[:2]), zero.reshape(blocks.shape[:2]))


def grids(values: FloatArray, importance: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """Return the scale and the zero point of each block, float32 [blocks] each; the zero point is a whole number.

    Args:
        values: float32 [blocks, size].
        importance: float32 that broadcasts to the values, weights of their squared errors; None: all are equal.
    """
    low, high = np.minimum(values.min(axis=1), 0), np.maximum(values.max(axis=1), 0)
    middle, whole = (high + low) / 2, (high - low) / LARGEST
    whole[whole == 0] = 1
    best = np.full(len(values), -1, np.float32)
    scale, zero = whole.copy(), np.zeros_like(whole)
    for share in _SHARES:
        tried = whole * np.float32(share)
        middles = np.clip(np.rint(LARGEST / 2 - middle / tried), 0, LARGEST)
        integers = rounded(values, tried[:, None], middles[:, None])
        integers -= middles[:, None]
        weighted = integers if importance is None else integers * importance
        along, length = (np.einsum("bi,bi->b", weighted, other) for other in (values, integers))
        # With the scale fitted, the squared error is that of all zeros less along^2 / length.
        fitted = np.divide(along, length, out=np.zeros_like(along), where=length > 0)
        better = along * fitted > best
        best[better], scale[better], zero[better] = (along * fitted)[better], fitted[better], middles[better]
    scale[scale == 0] = 1  # a block of zeros
    return scale, zero


def rounded(values: FloatArray, scale: FloatArray, zero: FloatArray) -> FloatArray:
    """Return the integers 0..15 that stand for values, as float32; the arguments broadcast."""
    integers = values / scale
    np.rint(integers, out=integers)
    integers += zero
    clipped: FloatArray = np.clip(integers, 0, LARGEST, out=integers)
    return clipped


def in_blocks(weight: FloatArray, size: int) -> FloatArray:
    """Return a matrix [N, K] in blocks of a row [N, ceil(K / size), size], the last one filled up with zeros."""
    rows, columns = weight.shape
    if beyond := -columns % size:
        weight = np.pad(weight, ((0, 0), (0, beyond)))
    return weight.reshape(rows, -1, size)


def _parts(count: int, size: int, blocks_of_row: int) -> Iterator[slice]:
    """Yield slices of whole rows, of about as many values as are searched at a time."""
    step = max(1, _VALUES_AT_ONCE // (size * blocks_of_row)) * blocks_of_row
    return (slice(start, start + step) for start in range(0, count, step))


__all__ = ["LARGEST", "Integers", "grids", "in_blocks", "rounded", "search"]
