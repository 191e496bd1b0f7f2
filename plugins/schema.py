"""What an operator takes and gives, said once: its ONNX forms and its plugin's types and shapes follow from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

DOMAIN = "dynexport"
VERSION = 1
# TensorRT's parser takes a plugin instead of the body where a node says which one, and the plugin is registered.
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
    """An input or output.

    Attributes:
        dtype: an element type, or ``T`` where any of ``FLOATS`` may stand, the same for all of a node's ``T``.
        dims: one letter a dimension; where a letter comes again, the sizes are equal.
        meaning: half a sentence.
    """

    name: str
    dtype: ir.DataType | str
    dims: str
    meaning: str


@dataclass(frozen=True)
class Operator:
    """An operator of domain ``dynexport``.

    Attributes:
        outputs: their dimensions are all dimensions of inputs.
        body: writes the operator with standard operators: ``body(op, *inputs)``.
        in_place: whether the first output is the first input with some of it overwritten, so that a kernel may work in
            its memory.
    """

    name: str
    doc: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    body: Callable[..., ir.Value | Sequence[ir.Value]]
    in_place: bool = False

    def source(self, letter: str) -> tuple[int, int]:
        """The first input and axis that have this dimension."""
        return next((i, tensor.dims.index(letter)) for i, tensor in enumerate(self.inputs) if letter in tensor.dims)


__all__ = ["DOMAIN", "FLOATS", "PLUGIN_ATTRIBUTES", "TENSORRT_TYPES", "VERSION", "Operator", "T", "Tensor"]
