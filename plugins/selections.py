"""The CPU operators of a Radial Network's decode step: choosing a layer, and computing with the chosen one's weights.

``index`` int64 [B] is each row's layer; -1 for a row that has none, whose products are zeros. Weights are stacks of
those of all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from dynexport.plugins import selection_bodies as bodies
from dynexport.plugins.products import Product, as_float
from dynexport.plugins.schema import DOMAIN

_CHOSEN = ("x", "index")
_ROUTER = ("norm", "epsilon", "fc1", "bias1", "fc2", "bias2")
_OF_HOP = ("hop", "layers", "exits", "reuses")
SELECTIONS = (
    Product(
        "SelectedBlockMatMul",
        (*_CHOSEN, "quantized", "scales", "minima"),
        ("N", "bits", "zero"),
        bodies.selected_block_matmul,
    ),
    Product("SelectedHalfMatMul", (*_CHOSEN, "weights"), ("N",), bodies.selected_half_matmul),
    Product("SelectedFloatMatMul", (*_CHOSEN, "weights"), (), bodies.selected_float_matmul),
    Product("SelectedNorm", (*_CHOSEN, "weights", "epsilon"), (), bodies.selected_norm),
    Product("SelectedAddNorm", (*_CHOSEN, "weights", "epsilon", "residual"), (), bodies.selected_add_norm),
    Product("ChooseLayer", ("x", *_ROUTER, "forced", "before", "seen"), _OF_HOP, bodies.choose_layer),
)


@dataclass(frozen=True)
class RouterWeights:
    """The weights of a router, fc2(silu(fc1(norm(x)))).

    Attributes:
        norm: float32 [hidden].
        fc1: float32 [units, hidden].
        bias1: float32 [units].
        fc2: float32 [choices, units].
        bias2: float32 [choices].
    """

    norm: ir.Value
    fc1: ir.Value
    bias1: ir.Value
    fc2: ir.Value
    bias2: ir.Value


@dataclass(frozen=True)
class HopChoice:
    """The result of ``choose_layer``.

    Attributes:
        index: int64 [B], the chosen layer; -1 for a row that exits, or is at its end.
        any: bool scalar, whether a row has a layer.
        seen: bool [B, choices], with the choices of this hop.
        path: int64 [1, B, 1], the choice, -1 for a row at its end.
        score: float32 [1, B, 1], of the choice; NaN if any score of the row is not finite.
        margin: float32 [1, B, 1], from the best allowed score to the next.
        gate: float32 [B], the choice's probability among the allowed ones.
    """

    index: ir.Value
    any: ir.Value
    seen: ir.Value
    path: ir.Value
    score: ir.Value
    margin: ir.Value
    gate: ir.Value


def choose_layer(
    op: Any,
    x: ir.Value,
    router: RouterWeights,
    forced: ir.Value,
    before: ir.Value,
    seen: ir.Value,
    *,
    epsilon: float,
    hop: int,
    layers: int,
    exits: bool,
    reuses: bool,
) -> HopChoice:
    """Return every row's decision in a hop, with the lowest choice on ties.

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [B, 1, hidden].
        router: the hop's router.
        forced: int64 [hops, B, 1], -1 where the router decides.
        before: int64 [B], negative for a row that is at its end.
        seen: bool [B, choices], layers that may not be chosen again.
        epsilon: of the router's norm.
        hop: the hop's number.
        layers: number of layers; a choice behind them is the exit.
        exits: whether a row may exit in this hop.
        reuses: whether a layer may be chosen again.
    """
    r = router
    weights = (r.norm, op.Constant(value_float=epsilon), r.fc1, r.bias1, r.fc2, r.bias2)
    told = {"hop": hop, "layers": layers, "exits": int(exits), "reuses": int(reuses)}
    made = HopChoice(*op.ChooseLayer(x, *weights, forced, before, seen, _domain=DOMAIN, _outputs=7, **told))
    made.any.shape = ir.Shape([])
    for value in (made.index, made.path):
        value.type = ir.TensorType(ir.DataType.INT64)
    for value in (made.any, made.seen):
        value.type = ir.TensorType(ir.DataType.BOOL)
    for value in (made.score, made.margin, made.gate):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return made


def selected_block_matmul(
    op: Any,
    x: ir.Value,
    index: ir.Value,
    quantized: ir.Value,
    scales: ir.Value,
    minima: ir.Value,
    *,
    rows: int,
    bits: int,
    zero: int,
) -> ir.Value:
    """Return x W^T for each row's W, float32 [B, 1, N], for x [B, 1, K].

    The parts of W are those of ``products.block_matmul``, with an axis of layers before.
    """
    made = op.SelectedBlockMatMul(x, index, quantized, scales, minima, _domain=DOMAIN, N=rows, bits=bits, zero=zero)
    return as_float(made)


def selected_half_matmul(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value, *, rows: int) -> ir.Value:
    """Return x W^T for each row's W, with ``weights`` as in ``products.half_matmul`` and an axis of layers before."""
    return as_float(op.SelectedHalfMatMul(x, index, weights, _domain=DOMAIN, N=rows))


def selected_float_matmul(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value) -> ir.Value:
    """Return x W^T for each row's W, of float32 [layers, N, K]."""
    return as_float(op.SelectedFloatMatMul(x, index, weights, _domain=DOMAIN))


def selected_norm(op: Any, x: ir.Value, index: ir.Value, weights: ir.Value, epsilon: float) -> ir.Value:
    """Return RMSNorm of x [B, .., size] over its last axis, with weights of float32 [layers, size]."""
    return as_float(op.SelectedNorm(x, index, weights, op.Constant(value_float=epsilon), _domain=DOMAIN))


def selected_add_norm(
    op: Any, x: ir.Value, index: ir.Value, weights: ir.Value, epsilon: float, residual: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Return (norm(x + residual), x + residual); otherwise as ``selected_norm``."""
    small = op.Constant(value_float=epsilon)
    normed, total = op.SelectedAddNorm(x, index, weights, small, residual, _domain=DOMAIN, _outputs=2)
    return as_float(normed), as_float(total)


__all__ = [
    "SELECTIONS",
    "HopChoice",
    "RouterWeights",
    "choose_layer",
    "selected_add_norm",
    "selected_block_matmul",
    "selected_float_matmul",
    "selected_half_matmul",
    "selected_norm",
]
