"""Models of one CPU operator each, random matrices, and what the operators mean, in plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from dynexport.plugins import products
from dynexport.plugins.graph import add_functions
from dynexport.plugins.layouts import interleaved_blocks, interleaved_halves, interleaved_scales

Array = NDArray[Any]


@dataclass(frozen=True)
class BlockCase:
    """A matrix in blocks: weight[n, b, i] = scale[n, b] * (q[n, b, i] - zero) + minimum[n, b]."""

    q: Array
    scale: Array
    minimum: Array | None
    bits: int
    zero: int

    @classmethod
    def drawn(cls, random: np.random.Generator, **fixed: Any) -> BlockCase:
        """A matrix of a random kind and shape; N is often no multiple of 16."""
        bits, size = fixed.get("bits") or random.choice([4, 8]), fixed.get("size") or random.choice([16, 32])
        rows, blocks = fixed.get("rows") or random.integers(1, 70), fixed.get("blocks") or random.integers(1, 9)
        dtype = fixed.get("dtype") or random.choice([np.float16, np.float32])
        q = random.integers(0, 1 << bits, (rows, blocks, size)).astype(np.uint8)
        if random.random() < 0.2:  # the largest sums that there are
            q[:] = (1 << bits) - 1
        scale, minimum = random.normal(size=(2, rows, blocks)).astype(dtype)
        return cls(q, scale, minimum if random.random() < 0.5 else None, int(bits), int(random.integers(0, 1 << bits)))

    @property
    def columns(self) -> int:
        return self.q.shape[1] * self.q.shape[2]

    def weight(self) -> Array:
        """The matrix [N, K] in float64."""
        blocks = self.scale.astype(np.float64)[..., None] * (self.q.astype(np.float64) - self.zero)
        if self.minimum is not None:
            blocks += self.minimum.astype(np.float64)[..., None]
        return blocks.reshape(len(blocks), -1)

    def parts(self) -> list[Array]:
        """The operator's inputs."""
        minima = np.zeros((1, 1, 1), self.scale.dtype) if self.minimum is None else interleaved_scales(self.minimum)
        return [interleaved_blocks(self.q, self.bits), interleaved_scales(self.scale), minima]

    def attributes(self) -> dict[str, int]:
        return {"rows": len(self.q), "bits": self.bits, "zero": self.zero}


@dataclass(frozen=True)
class HalfCase:
    """A matrix of 16-bit floats."""

    values: Array

    @classmethod
    def drawn(cls, random: np.random.Generator) -> HalfCase:
        dtype = ml_dtypes.bfloat16 if random.random() < 0.5 else np.float16
        rows, columns = random.integers(1, 70), 2 * random.integers(1, 80)
        values = random.normal(size=(rows, columns)).astype(dtype)
        values[random.random(values.shape) < 0.05] = dtype(6e-7)  # subnormal in float16
        return cls(values)

    @property
    def columns(self) -> int:
        return int(self.values.shape[1])

    def weight(self) -> Array:
        return self.values.astype(np.float64)

    def parts(self) -> list[Array]:
        return [interleaved_halves(self.values)]

    def attributes(self) -> dict[str, int]:
        return {"rows": len(self.values)}


def rounded(x: Array, size: int) -> Array:
    """Rows as the kernel rounds them, int8 with one float32 scale per block, in float64."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    most = np.abs(blocks).max(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(most < np.float32(1e-30), np.float32(0), np.float32(127) / most)
    values = np.rint(blocks * factor).astype(np.float64) * np.where(factor == 0, 0, most / np.float32(127))
    return values.reshape(x.shape)


def model(call: str, case: BlockCase | HalfCase, shape: tuple[int, ...], *, constant: bool = True) -> bytes:
    """A model of one call on an input of ``shape``, with weights as constants or as inputs."""
    made = ir.Graph([], [], nodes=[], name=call, opset_imports={"": 24})
    dtype = ir.DataType.INT64 if "gather" in call else ir.DataType.FLOAT
    first = ir.Value(name="x", type=ir.TensorType(dtype), shape=ir.Shape(shape))
    made.inputs.append(first)
    parts = []
    for i, array in enumerate(case.parts()):
        tensor = ir.Tensor(array, name=f"part{i}")
        value = ir.Value(name=f"part{i}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        parts.append(value)
        if constant:
            value.const_value = tensor
            made.register_initializer(value)
        else:
            made.inputs.append(value)
    y = getattr(products, call)(GraphBuilder(made).op, first, *parts, **case.attributes())
    y.name = "y"
    made.outputs.append(y)
    whole = ir.Model(made, ir_version=11)
    add_functions(whole)
    return ir.to_proto(whole).SerializeToString()


__all__ = ["BlockCase", "HalfCase", "model", "rounded"]
