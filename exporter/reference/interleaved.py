"""Read matrices of BlockMatMul and BlockGather back from a graph, by the description in docs/plugins.md.

It shares no code with what packs them: groups of 16 rows, whose integers lie in chunks of 4 bytes for each row; with 4
bits, a byte's lower half belongs to the first 4 of 8 values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
OPERATORS = ("BlockMatMul", "BlockGather")


@dataclass(frozen=True)
class Interleaved:
    """The parts of a matrix [rows, K], as the graph stores them.

    Attributes:
        quantized: uint8 [groups, blocks, chunks, 16, 4].
        scales: [groups, blocks, 16].
        minima: as scales, or [1, 1, 1].
    """

    quantized: NDArray[np.uint8]
    scales: NDArray[Any]
    minima: NDArray[Any]
    rows: int
    bits: int
    zero: int

    def read(self) -> tuple[FloatArray, FloatArray]:
        """Return the dequantised values and the scale of each, both float32 [rows, K]."""
        groups, blocks, chunks = self.quantized.shape[:3]
        size = chunks * 32 // self.bits
        values = np.zeros((groups * 16, blocks * size), np.float32)
        steps = np.zeros_like(values)
        minima = np.broadcast_to(self.minima, self.scales.shape)
        for lane in range(16):
            scale, minimum = (part[:, :, lane].astype(np.float32)[..., None] for part in (self.scales, minima))
            stored = self.quantized[:, :, :, lane]
            halves = [stored] if self.bits == 8 else [stored & 15, stored >> 4]
            q = np.concatenate(halves, axis=-1).reshape(groups, blocks, size)
            values[lane::16] = ((q.astype(np.float32) - self.zero) * scale + minimum).reshape(groups, -1)
            steps[lane::16] = np.repeat(np.abs(scale[..., 0]), size, axis=-1)
        return values[: self.rows], steps[: self.rows]


__all__ = ["OPERATORS", "Interleaved"]
