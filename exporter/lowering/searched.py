"""4-bit integers with a zero point and a scale for each block of a row, chosen for small errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from dynexport.exporter.lowering.storage import Array, BlockQuantized, Storage, joined_nibbles, parameter
from dynexport.exporter.quantise.integers import Integers, search


class OfIntegers(Storage):
    """A storage that takes a matrix as 4-bit integers, from whoever rounds it.

    Attributes:
        block_size: values per block.
    """

    block_size: int

    @abstractmethod
    def packed(self, integers: Integers) -> dict[str, Array]:
        """Return the values of the parameters for a matrix that is rounded already, in blocks of ``block_size``."""

    def pack(self, weight: Array) -> dict[str, Array]:
        return self.packed(search(weight, self.block_size))


@dataclass(frozen=True)
class SearchedBlocks(OfIntegers, BlockQuantized):
    """Storage as 4-bit integers, one float32 scale and one whole zero point per block of a row (layout of MatMulNBits).

    In addition to the parameters of ``BlockQuantized``, there is ``_zero_points`` uint8 [N, ceil(blocks / 2)], two in a
    byte, the first in its lower half.
    """

    bits: int = 4

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        blocks = -(-columns // self.block_size)
        return {**super().parameters(shape), "_zero_points": parameter([rows, -(-blocks // 2)], ir.DataType.UINT8)}

    def packed(self, integers: Integers) -> dict[str, Array]:
        return {
            "_quantized": joined_nibbles(integers.q),
            "_scales": integers.scale,
            "_zero_points": joined_nibbles(integers.zero),
        }


__all__ = ["OfIntegers", "SearchedBlocks"]
