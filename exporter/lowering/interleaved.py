"""Storages that dynexport's CPU operators read, and their products and lookups (docs/plugins.md)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from dynexport.exporter.checkpoint.blocks import Blocks, Form
from dynexport.exporter.lowering.blocks import OfPieces, Packed, Piece
from dynexport.exporter.lowering.searched import OfIntegers
from dynexport.exporter.lowering.storage import Array, BlockQuantized, Storage, StoredWeight, parameter
from dynexport.exporter.quantise.integers import Integers
from dynexport.plugins.layouts import (
    BLOCK_SIZES,
    LANES,
    interleaved_blocks,
    interleaved_halves,
    interleaved_scales,
)
from dynexport.plugins.products import block_gather, block_matmul, half_gather, half_matmul
from dynexport.plugins.selections import selected_block_matmul, selected_half_matmul

# Stored types whose scales and minima are float16; the products of scales in the others need float32.
_FLOAT16_SCALES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL"})


class Interleaved(Storage):
    """A storage with 16 rows side by side."""

    @abstractmethod
    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        """Multiply x [.., K] by W^T."""

    @abstractmethod
    def multiply_chosen(self, op: Any, x: ir.Value, index: ir.Value, weight: StoredWeight) -> ir.Value:
        """Multiply x [B, 1, K] by each row's W^T, for stacked matrices and layers int64 [B]."""

    @abstractmethod
    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """Return the rows of W at indices."""


@dataclass(frozen=True)
class InterleavedHalves(Interleaved):
    """Storage as bfloat16 or float16, for HalfMatMul and HalfGather; the number of columns is even."""

    dtype: ir.DataType

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        together = 1 if self.dtype == ir.DataType.FLOAT16 else 2
        return {"_halves": parameter([-(-rows // LANES), columns // together, LANES, together], self.dtype)}

    def pack(self, weight: Array) -> dict[str, Array]:
        return {"_halves": interleaved_halves(weight.astype(self.dtype.numpy()))}

    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        return half_matmul(op, x, weight.parts["_halves"], rows=weight.shape[0])

    def multiply_chosen(self, op: Any, x: ir.Value, index: ir.Value, weight: StoredWeight) -> ir.Value:
        return selected_half_matmul(op, x, index, weight.parts["_halves"], rows=weight.shape[0])

    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        return half_gather(op, indices, weight.parts["_halves"], rows=weight.shape[0])


@dataclass(frozen=True)
class InterleavedBlocks(Interleaved):
    """Storage as blocks of integers, for BlockMatMul and BlockGather; rows consist of whole blocks.

    Attributes:
        bits: bits of a stored integer, 4 or 8.
        zero: the integer that stands for 0.
        block_size: values per block.
        minima: whether blocks have a minimum.
        scales: type of scales and minima, float32 or float16.
    """

    bits: int
    zero: int
    block_size: int = 32
    minima: bool = False
    scales: ir.DataType = ir.DataType.FLOAT

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        groups, blocks = -(-shape[0] // LANES), shape[1] // self.block_size
        of_blocks = [groups, blocks, LANES]
        return {
            "_quantized": parameter([groups, blocks, self.block_size * self.bits // 32, LANES, 4], ir.DataType.UINT8),
            "_scales": parameter(of_blocks, self.scales),
            "_minima": parameter(of_blocks if self.minima else [1, 1, 1], self.scales),
        }

    def values(self, q: Array, scale: Array, minimum: Array | None) -> dict[str, Array]:
        """Return the values of the parameters, for q uint8 [N, blocks, size] and scales and minima [N, blocks]."""
        dtype = self.scales.numpy()
        minima = np.zeros((1, 1, 1), dtype) if minimum is None else interleaved_scales(minimum.astype(dtype))
        return {
            "_quantized": interleaved_blocks(q, self.bits),
            "_scales": interleaved_scales(scale.astype(dtype)),
            "_minima": minima,
        }

    def multiply(self, op: Any, x: ir.Value, weight: StoredWeight) -> ir.Value:
        return block_matmul(op, x, *_blocks(weight), rows=weight.shape[0], bits=self.bits, zero=self.zero)

    def multiply_chosen(self, op: Any, x: ir.Value, index: ir.Value, weight: StoredWeight) -> ir.Value:
        parts, rows = _blocks(weight), weight.shape[0]
        return selected_block_matmul(op, x, index, *parts, rows=rows, bits=self.bits, zero=self.zero)

    def look_up(self, op: Any, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        return block_gather(op, indices, *_blocks(weight), rows=weight.shape[0], bits=self.bits, zero=self.zero)


class RoundedBlocks(InterleavedBlocks):
    """The integers that MatMulNBits would get of a float32 weight."""

    def pack(self, weight: Array) -> dict[str, Array]:
        packed = BlockQuantized(self.bits, self.block_size).pack(weight)
        stored = packed["_quantized"]
        q = stored if self.bits == 8 else np.stack([stored & 15, stored >> 4], axis=-1).reshape(*stored.shape[:2], -1)
        return self.values(q, packed["_scales"], None)


@dataclass(frozen=True)
class SearchedInterleaved(InterleavedBlocks, OfIntegers):
    """4-bit integers with a scale and a minimum for each block, chosen for small errors."""

    bits: int = 4
    zero: int = 0
    minima: bool = True

    def packed(self, integers: Integers) -> dict[str, Array]:
        return self.values(integers.q, integers.scale, -integers.scale * integers.zero)


class KeptBlocks(InterleavedBlocks, OfPieces):
    """The integers, scales and minima of the checkpoint's own blocks, all exact."""

    @classmethod
    def of(cls, form: Form) -> KeptBlocks | None:
        """Return the storage of blocks of a form; None for one that the operators do not read."""
        if form.size not in BLOCK_SIZES:
            return None
        scales = ir.DataType.FLOAT16 if form.kind in _FLOAT16_SCALES else ir.DataType.FLOAT
        bits = 4 if form.bits <= 4 else 8
        return cls(bits=bits, zero=form.zero, block_size=form.size, minima=form.minima, scales=scales)

    def pack_pieces(self, pieces: Sequence[Piece]) -> Packed:
        (blocks,) = pieces
        assert isinstance(blocks, Blocks)
        return Packed(self.values(blocks.q, blocks.scale, blocks.minimum), {blocks.kind: 0.0})


def _blocks(weight: StoredWeight) -> tuple[ir.Value, ir.Value, ir.Value]:
    return weight.parts["_quantized"], weight.parts["_scales"], weight.parts["_minima"]


__all__ = [
    "Interleaved",
    "InterleavedBlocks",
    "InterleavedHalves",
    "KeptBlocks",
    "RoundedBlocks",
    "SearchedInterleaved",
]
