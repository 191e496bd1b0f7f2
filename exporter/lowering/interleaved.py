"""Storages that dynexport's CPU operators read, and their products and lookups (docs/plugins.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.lowering.storage import Array, BlockQuantized, Storage, StoredWeight, parameter
from dynexport.plugins.layouts import LANES, interleaved_blocks, interleaved_halves, interleaved_scales
from dynexport.plugins.products import block_gather, block_matmul, half_gather, half_matmul


class Interleaved(Storage):
    """A storage with 16 rows side by side."""

    @abstractmethod
    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether a weight of this shape can be stored so."""

    @abstractmethod
    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Multiply x [.., K] by W^T."""

    @abstractmethod
    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Return the rows of W at indices."""


@dataclass(frozen=True)
class InterleavedHalves(Interleaved):
    """Storage as bfloat16 or float16, for HalfMatMul and HalfGather."""

    dtype: ir.DataType

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[1] % 2 == 0

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        together = 1 if self.dtype == ir.DataType.FLOAT16 else 2
        return {"_halves": parameter([-(-rows // LANES), columns // together, LANES, together], self.dtype)}

    def pack(self, weight: Array) -> dict[str, Array]:
        return {"_halves": interleaved_halves(weight.astype(self.dtype.numpy()))}

    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        return half_matmul(op, x, weight.parts["_halves"], rows=weight.shape[0])

    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        return half_gather(op, indices, weight.parts["_halves"], rows=weight.shape[0])


@dataclass(frozen=True)
class InterleavedBlocks(Interleaved):
    """Storage of the integers that MatMulNBits would get, for BlockMatMul and BlockGather."""

    bits: int
    size: int = 32

    @property
    def zero(self) -> int:
        """The integer that stands for 0."""
        return 1 << (self.bits - 1)

    def fits(self, shape: Sequence[int]) -> bool:
        return shape[1] % self.size == 0

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        groups, blocks = -(-shape[0] // LANES), shape[1] // self.size
        return {
            "_quantized": parameter([groups, blocks, self.size * self.bits // 32, LANES, 4], ir.DataType.UINT8),
            "_scales": parameter([groups, blocks, LANES]),
            "_minima": parameter([1, 1, 1]),
        }

    def pack(self, weight: Array) -> dict[str, Array]:
        packed = BlockQuantized(self.bits, self.size).pack(weight)
        stored = packed["_quantized"]
        q = stored if self.bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
        return {
            "_quantized": interleaved_blocks(q, self.bits),
            "_scales": interleaved_scales(packed["_scales"]),
            "_minima": np.zeros((1, 1, 1), np.float32),
        }

    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        return block_matmul(op, x, *_blocks(weight), rows=weight.shape[0], bits=self.bits, zero=self.zero)

    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        return block_gather(op, indices, *_blocks(weight), rows=weight.shape[0], bits=self.bits, zero=self.zero)


def _blocks(weight: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value]:
    return weight.parts["_quantized"], weight.parts["_scales"], weight.parts["_minima"]


__all__ = ["Interleaved", "InterleavedBlocks", "InterleavedHalves"]
