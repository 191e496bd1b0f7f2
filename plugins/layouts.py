"""The layouts of matrices that the CPU kernels read: 16 rows side by side, everything in the order of reading."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LANES = 16
# Values of one block that a row of bytes holds: 4 of 8 bits, or 8 of 4 bits.
_TOGETHER = 4
BLOCK_SIZES = (16, 32)


def interleaved_blocks(q: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Return integers uint8 [N, blocks, size] as BlockMatMul reads them: [N / 16, blocks, size * bits / 32, 16, 4].

    A byte holds one value of 8 bits, or of 8 neighbours the values i (low half) and i + 4. The last rows are zeros
    where N is no multiple of 16.
    """
    blocks = q.shape[1]
    values = 8 // bits
    # [groups, lanes, blocks, chunks, values, 4]
    split = _padded(q).reshape(-1, LANES, blocks, q.shape[2] // (_TOGETHER * values), values, _TOGETHER)
    packed = split[..., 0, :] if values == 1 else split[..., 0, :] | (split[..., 1, :] << 4)
    return np.ascontiguousarray(packed.transpose(0, 2, 3, 1, 4))


def interleaved_scales(scales: NDArray[Any]) -> NDArray[Any]:
    """Return one number per row and block [N, blocks] as [N / 16, blocks, 16]."""
    padded = _padded(scales)
    return np.ascontiguousarray(padded.reshape(-1, LANES, scales.shape[1]).transpose(0, 2, 1))


def interleaved_halves(weight: NDArray[Any]) -> NDArray[Any]:
    """Return a matrix of 16-bit floats [N, K] as HalfMatMul reads it: [N / 16, K / together, 16, together].

    ``together`` is 2 for bfloat16 and 1 for float16; K is even.
    """
    together = 1 if weight.dtype == np.float16 else 2
    padded = _padded(weight)
    split = padded.reshape(-1, LANES, weight.shape[1] // together, together)
    return np.ascontiguousarray(split.transpose(0, 2, 1, 3))


def _padded(rows: NDArray[Any]) -> NDArray[Any]:
    """Return rows [N, ..] with rows of zeros up to a multiple of 16."""
    return np.pad(rows, [(0, -len(rows) % LANES), *[(0, 0)] * (rows.ndim - 1)])


__all__ = ["BLOCK_SIZES", "LANES", "interleaved_blocks", "interleaved_halves", "interleaved_scales"]
