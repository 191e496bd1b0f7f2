"""The CPU operators: products with matrices in blocks of integers or of 16-bit floats, and rows of these matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import build_function

from dynexport.plugins import product_bodies as bodies
from dynexport.plugins.schema import DOMAIN, VERSION

OPSET = 24


@dataclass(frozen=True)
class Product:
    """A CPU operator of domain ``dynexport``.

    Attributes:
        name: name of the operator.
        inputs: names of the inputs.
        attributes: names of the attributes that are integers.
        body: function that builds the operator from standard operators: ``body(op, *inputs)``.
        floats: names of further attributes, which are floats.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: tuple[str, ...]
    body: Callable[..., Any]
    floats: tuple[str, ...] = ()


_BLOCKS = ("quantized", "scales", "minima")
PRODUCTS = (
    Product("BlockMatMul", ("x", *_BLOCKS), ("N", "bits", "zero"), bodies.block_matmul),
    Product("BlockGather", ("indices", *_BLOCKS), ("N", "bits", "zero"), bodies.block_gather),
    Product("HalfMatMul", ("x", "weights"), ("N",), bodies.half_matmul),
    Product("HalfGather", ("indices", "weights"), ("N",), bodies.half_gather),
)


def block_matmul(
    op: Any,
    x: ir.Value,
    quantized: ir.Value,
    scales: ir.Value,
    minima: ir.Value,
    *,
    rows: int,
    bits: int,
    zero: int,
) -> ir.Value:
    """Return x W^T, float32 [.., N]; the kernel rounds x to 8 bits per block, the body does not.

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [.., K].
        quantized: uint8 [N / 16, K / size, size * bits / 32, 16, 4], as ``layouts.interleaved_blocks`` makes it.
        scales: float32 or float16 [N / 16, K / size, 16].
        minima: as scales; or [1, 1, 1], one zero, where there are none.
        rows: N.
        bits: 4 or 8.
        zero: the integer that stands for 0: weight = scale * (q - zero) + minimum.
    """
    return _call(op, "BlockMatMul", x, quantized, scales, minima, N=rows, bits=bits, zero=zero)


def block_gather(
    op: Any,
    indices: ir.Value,
    quantized: ir.Value,
    scales: ir.Value,
    minima: ir.Value,
    *,
    rows: int,
    bits: int,
    zero: int,
) -> ir.Value:
    """Return the rows of W at indices int64 [..], dequantised: float32 [.., K]. W is as in ``block_matmul``."""
    return _call(op, "BlockGather", indices, quantized, scales, minima, N=rows, bits=bits, zero=zero)


def half_matmul(op: Any, x: ir.Value, weights: ir.Value, *, rows: int) -> ir.Value:
    """Return x W^T, float32 [.., N], accumulated in float32.

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [.., K].
        weights: bfloat16 [N / 16, K / 2, 16, 2] or float16 [N / 16, K, 16, 1], as ``layouts.interleaved_halves`` makes
            it; K is even.
        rows: N.
    """
    return _call(op, "HalfMatMul", x, weights, N=rows)


def half_gather(op: Any, indices: ir.Value, weights: ir.Value, *, rows: int) -> ir.Value:
    """Return the rows of W at indices int64 [..] in float32: [.., K]. W is as in ``half_matmul``."""
    return _call(op, "HalfGather", indices, weights, N=rows)


def function(product: Product) -> ir.Function:
    """Return an operator's body as an ONNX local function."""
    made: ir.Function = build_function(
        product.body,
        [ir.Value(name=name) for name in product.inputs],
        domain=DOMAIN,
        name=product.name,
        attributes=[
            *(ir.Attr(name, ir.AttributeType.INT, None) for name in product.attributes),
            *(ir.Attr(name, ir.AttributeType.FLOAT, None) for name in product.floats),
        ],
        opset_imports={"": OPSET, DOMAIN: VERSION},
    )
    return made


def _call(op: Any, name: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
    return as_float(getattr(op, name)(*inputs, _domain=DOMAIN, **attributes))


def as_float(made: ir.Value) -> ir.Value:
    """Declare a value float32, as the builder does not infer types for an unknown domain."""
    made.type = ir.TensorType(ir.DataType.FLOAT)
    return made


__all__ = [
    "PRODUCTS",
    "Product",
    "as_float",
    "block_gather",
    "block_matmul",
    "function",
    "half_gather",
    "half_matmul",
]
