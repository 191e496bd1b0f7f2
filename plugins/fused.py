"""CPU operators that join products with what stands around them, so that threads meet once instead of after each.

Their bodies call the products themselves, so a library of kernels without them still computes the products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes

from dynexport.plugins.products import Product
from dynexport.plugins.schema import DOMAIN

EPSILON = "epsilon"
# The inputs that are a matrix, and the attributes that belong to one.
_PARTS = {"Block": ("quantized", "scales", "minima"), "Half": ("weights",)}
_ATTRIBUTES = {"Block": ("bits", "zero"), "Half": ()}
MATRICES = ("o", "gate", "up", "down")


def norm_matmul(kind: str) -> Product:
    """Return the operator BlockNormMatMul or HalfNormMatMul: the product of rows that RMSNormalization has normed."""

    def body(op: Any, x: ir.Value, norm: ir.Value, *parts: ir.Value) -> Any:
        return _product(op, kind, _normed(op, x, norm), parts, "N", "")

    return Product(f"{kind}NormMatMul", ("x", "norm", *_PARTS[kind]), ("N", *_ATTRIBUTES[kind]), body, (EPSILON,))


def after_attention(kind: str) -> Product:
    """Return the operator BlockAfterAttention or HalfAfterAttention: all that follows attention in a layer."""
    parts = tuple(f"{matrix}_{part}" for matrix in MATRICES for part in _PARTS[kind])
    attributes = tuple(f"{matrix}_{name}" for matrix in MATRICES for name in _ATTRIBUTES[kind])

    def body(op: Any, attention: ir.Value, residual: ir.Value, norm: ir.Value, *parts: ir.Value) -> Any:
        count = len(_PARTS[kind])
        of = {matrix: parts[i * count : (i + 1) * count] for i, matrix in enumerate(MATRICES)}
        added = op.Add(residual, _product(op, kind, attention, of["o"], "hidden", "o_"))
        normed = _normed(op, added, norm)
        gate = op.Swish(_product(op, kind, normed, of["gate"], "inner", "gate_"), alpha=1.0)
        inner = op.Mul(gate, _product(op, kind, normed, of["up"], "inner", "up_"))
        return op.Add(added, _product(op, kind, inner, of["down"], "hidden", "down_"))

    inputs = ("attention", "residual", "norm", *parts)
    return Product(f"{kind}AfterAttention", inputs, ("hidden", "inner", *attributes), body, (EPSILON,))


FUSED = tuple(made(kind) for kind in _PARTS for made in (norm_matmul, after_attention))
_NAMES = frozenset(product.name for product in FUSED)


def unfused(model: ir.Model) -> ir.Model:
    """Return a model with the bodies of these operators in place of their calls; the model itself is changed."""
    inline: Callable[[ir.Model], Any] = passes.InlinePass(lambda body: body.domain == DOMAIN and body.name in _NAMES)
    result: ir.Model = inline(model).model
    return result


def _normed(op: Any, x: ir.Value, norm: ir.Value) -> Any:
    return op.RMSNormalization(x, norm, axis=-1, epsilon=ir.RefAttr(EPSILON, EPSILON, ir.AttributeType.FLOAT))


def _product(op: Any, kind: str, x: Any, parts: tuple[ir.Value, ...], rows: str, prefix: str) -> Any:
    own = {name: _integer(name, prefix + name) for name in _ATTRIBUTES[kind]}
    made = getattr(op, f"{kind}MatMul")(x, *parts, _domain=DOMAIN, N=_integer("N", rows), **own)
    made.type = ir.TensorType(ir.DataType.FLOAT)
    return made


def _integer(name: str, of_call: str) -> ir.Attr:
    return ir.RefAttr(name, of_call, ir.AttributeType.INT)


__all__ = ["EPSILON", "FUSED", "MATRICES", "after_attention", "norm_matmul", "unfused"]
