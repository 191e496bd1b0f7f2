"""The description of an operator, from which its ONNX schema and its plugin's types and shapes are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

DOMAIN = "dynexport"
VERSION = 1
# TensorRT's parser uses a registered plugin instead of the body for a node that has these attributes.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

# The type parameter: hidden states, weights and caches.
T = "T"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# TensorRT's names of the element types.
TENSORRT_TYPES: dict[ir.DataType | str, str] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
}


@dataclass(frozen=True)
class Tensor:
    """An input or output of an operator.

    Attributes:
        name: name in the schema.
        dtype: element type, or ``T`` for any type of ``FLOATS``, the same for every ``T`` of a node.
        dims: one letter per dimension; equal letters mean equal sizes.
        meaning: short description.
    """

    name: str
    dtype: ir.DataType | str
    dims: str
    meaning: str


@dataclass(frozen=True)
class Operator:
    """An operator of domain ``dynexport``.

    Attributes:
        name: name of the operator.
        doc: description in the schema.
        inputs: the inputs.
        outputs: the outputs; each of their dimensions is a dimension of an input.
        body: function that builds the operator from standard operators: ``body(op, *inputs)``.
        in_place: whether the first output is the first input, partly overwritten, so that a kernel may write in its
            memory.
    """

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    body: Callable[..., ir.Value | Sequence[ir.Value]]
    in_place: bool = False

    def source(self, letter: str) -> tuple[int, int]:
        """Return the index of the first input that has this dimension, and the axis."""
        return next((i, tensor.dims.index(letter)) for i, tensor in enumerate(self.inputs) if letter in tensor.dims)


__all__ = ["DOMAIN", "FLOATS", "PLUGIN_ATTRIBUTES", "TENSORRT_TYPES", "VERSION", "Operator", "T", "Tensor"]
