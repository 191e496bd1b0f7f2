"""Storage formats of weights, and the graph's parameters that hold them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

Array = np.ndarray


def parameter(shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """Return a value of the graph without a name or content; both are set later."""
    return ir.Value(shape=ir.Shape(shape), type=ir.TensorType(dtype))


def joined_nibbles(integers: Array) -> Array:
    """Join neighbours of 4-bit integers uint8 [.., n] to bytes, the first in the lower half; an odd one with 0."""
    if integers.shape[-1] % 2:
        integers = np.pad(integers, [(0, 0)] * (integers.ndim - 1) + [(0, 1)])
    joined: Array = integers[..., 0::2] | (integers[..., 1::2] << 4)
    return joined


class Storage(ABC):
    """A way to store a float32 weight as one or more parameters of the graph."""

    @abstractmethod
    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        """Return the parameters for a weight of this shape, by suffix of the tensor's name."""

    @abstractmethod
    def pack(self, weight: Array) -> dict[str, Array]:
        """Return the values of those parameters, computed from the float32 weight."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the graph with its storage.

    Attributes:
        shape: the weight's shape; where layers are stacked, the shape of one layer.
        storage: the storage format.
        parts: the parameters that hold the weight, by suffix of its name.
    """

    shape: tuple[int, ...]
    storage: Storage
    parts: dict[str, ir.Value]


@dataclass(frozen=True)
class Plain(Storage):
    """Storage as one float tensor of type ``dtype``."""

    dtype: ir.DataType = ir.DataType.FLOAT

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        return {"": parameter(shape, self.dtype)}

    def pack(self, weight: Array) -> dict[str, Array]:
        return {"": np.ascontiguousarray(weight, dtype=self.dtype.numpy())}


@dataclass(frozen=True)
class Stacked(Storage):
    """Storage of one weight of all layers of a pool; every parameter is stacked as [layers, ..].

    Attributes:
        single: the storage of one layer's weight.
        layers: number of layers.
    """

    single: Storage
    layers: int

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        return {suffix: self._stack_of(part) for suffix, part in self.single.parameters(shape).items()}

    def pack(self, weight: Array) -> dict[str, Array]:
        """Return the values for one layer."""
        return self.single.pack(weight)

    def _stack_of(self, part: ir.Value) -> ir.Value:
        assert part.shape is not None and part.dtype is not None
        return parameter([self.layers, *part.shape.numpy()], part.dtype)


@dataclass(frozen=True)
class BlockQuantized(Storage):
    """Storage as symmetric 4 or 8 bit integers, one float32 scale per block of a row (layout of MatMulNBits).

    Weight [N, K] becomes ``_quantized`` uint8 [N, ceil(K / block_size), block_size * bits / 8] and ``_scales``
    float32 [N, ceil(K / block_size)].
    """

    bits: int
    block_size: int = 32

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        blocks = -(-columns // self.block_size)
        return {
            "_quantized": parameter([rows, blocks, self.block_size * self.bits // 8], ir.DataType.UINT8),
            "_scales": parameter([rows, blocks]),
        }

    def pack(self, weight: Array) -> dict[str, Array]:
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

        config = DefaultWeightOnlyQuantConfig(block_size=self.block_size, is_symmetric=True, bits=self.bits)
        packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T))
        rows = weight.shape[0]
        return {
            "_quantized": packed.reshape(rows, -1, self.block_size * self.bits // 8),
            "_scales": scales.reshape(rows, -1),
        }


@dataclass(frozen=True)
class Dequantized(Storage):
    """Storage as symmetric 4 or 8 bit integers, for DequantizeLinear in front of a MatMul.

    Weight [N, K] becomes ``_quantized`` int8 or int4 [K, N] and ``_scales``: [N], or [K / block_size, N] with one scale
    per block of a row.

    Attributes:
        bits: 4 or 8.
        dtype: type of the scales and of the dequantised weight.
        block_size: values per block, a divisor of K; None: one scale per row.
    """

    bits: Literal[8, 4]
    dtype: ir.DataType
    block_size: int | None = None

    @property
    def axis(self) -> int:
        """Return the ``axis`` attribute of DequantizeLinear: the axis of the blocks, or of the scales."""
        return 1 if self.block_size is None else 0

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        rows, columns = shape
        scales = [rows] if self.block_size is None else [columns // self.block_size, rows]
        quantized = ir.DataType.INT8 if self.bits == 8 else ir.DataType.INT4
        return {"_quantized": parameter([columns, rows], quantized), "_scales": parameter(scales, self.dtype)}

    def pack(self, weight: Array) -> dict[str, Array]:
        largest = 2 ** (self.bits - 1) - 1
        blocks = weight.T.reshape(-1, self.block_size or weight.shape[1], weight.shape[0])
        scales = (np.abs(blocks).max(axis=1) / largest).astype(self.dtype.numpy())
        # Divide by the rounded scales that are stored. A block of zeros has the scale 0, where any divisor is right.
        divisors = np.where(scales == 0, 1, scales.astype(np.float32))[:, None]
        quantized = np.clip(np.rint(blocks / divisors), -largest - 1, largest).reshape(weight.T.shape)
        kind = np.dtype(np.int8) if self.bits == 8 else ir.DataType.INT4.numpy()
        return {
            "_quantized": quantized.astype(np.int8).astype(kind),
            "_scales": scales[0] if self.block_size is None else scales,
        }


@dataclass(frozen=True)
class Split(Storage):
    """Storage of a weight whose rows are stored in several ways, one part over the other.

    Attributes:
        parts: the number of rows and the storage of each part.
    """

    parts: tuple[tuple[int, Storage], ...]

    def parameters(self, shape: Sequence[int]) -> dict[str, ir.Value]:
        return {
            f".{i}{suffix}": value
            for i, (rows, storage) in enumerate(self.parts)
            for suffix, value in storage.parameters([rows, *shape[1:]]).items()
        }

    def split(self, weight: StoredWeight) -> list[StoredWeight]:
        """Return the parts of a weight as weights of their own."""
        found = []
        for i, (rows, storage) in enumerate(self.parts):
            prefix = f".{i}"
            parts = {k.removeprefix(prefix): v for k, v in weight.parts.items() if k.startswith(prefix)}
            found.append(StoredWeight((rows, *weight.shape[1:]), storage, parts))
        return found

    def pack(self, weight: Array) -> dict[str, Array]:
        return self.pack_each(weight, lambda storage, rows: storage.pack(rows))

    def pack_each(self, weight: Array, pack: Callable[[Storage, Array], dict[str, Array]]) -> dict[str, Array]:
        """Return the values of the parameters, where ``pack`` returns those of one part for its rows."""
        values, start = {}, 0
        for i, (rows, storage) in enumerate(self.parts):
            part = pack(storage, weight[start : start + rows])
            values.update({f".{i}{suffix}": value for suffix, value in part.items()})
            start += rows
        return values
