"""How a weight is stored in a bundle, and the parameters of the graph that hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxscript.nn import Parameter

Array = np.ndarray


class Storage(ABC):
    """One way to store a float32 weight: the graph's parameters for it, and their values."""

    @abstractmethod
    def parameters(self, shape: Sequence[int]) -> dict[str, Parameter]:
        """Parameters, by suffix of the tensor's name, for a weight of this shape."""

    @abstractmethod
    def pack(self, weight: Array) -> dict[str, Array]:
        """The values of those parameters from the float32 weight."""


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the graph: its shape, how it is stored, and the parameters that hold it, by suffix of its name."""

    shape: tuple[int, ...]
    storage: Storage
    parts: dict[str, Parameter]


@dataclass(frozen=True)
class Plain(Storage):
    """As a float tensor, widened to float32 where it is used."""

    dtype: ir.DataType = ir.DataType.FLOAT

    def parameters(self, shape: Sequence[int]) -> dict[str, Parameter]:
        return {"": Parameter(shape, self.dtype)}

    def pack(self, weight: Array) -> dict[str, Array]:
        return {"": np.ascontiguousarray(weight, dtype=self.dtype.numpy())}


@dataclass(frozen=True)
class BlockQuantized(Storage):
    """As 4 or 8 bit integers, symmetric, one float32 scale per block of a row (ONNX Runtime's MatMulNBits layout).

    Weight [N, K] becomes ``_quantized`` uint8 [N, ceil(K / block_size), block_size * bits / 8] and ``_scales``
    float32 [N, ceil(K / block_size)].
    """

    bits: int
    block_size: int = 32

    def parameters(self, shape: Sequence[int]) -> dict[str, Parameter]:
        rows, columns = shape
        blocks = -(-columns // self.block_size)
        return {
            "_quantized": Parameter([rows, blocks, self.block_size * self.bits // 8], ir.DataType.UINT8),
            "_scales": Parameter([rows, blocks]),
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
