"""The CPU operators of routed layers: a router's decision, and the chosen tokens' way into a layer and back."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from dynexport.plugins import route_bodies as bodies
from dynexport.plugins.products import Product
from dynexport.plugins.schema import DOMAIN

_ROUTER = ("x", "weight", "bias", "threshold", "told", "room")
ROUTES = (
    Product("RouteTokens", _ROUTER, ("inclusive",), bodies.route_tokens),
    Product("GatherTokens", ("x", "chosen"), (), bodies.gather_tokens),
    Product("ScatterGated", ("x", "y", "score", "places"), ("sigmoid",), bodies.scatter_gated),
)
_BOOL, _FLOAT, _INT64 = ir.DataType.BOOL, ir.DataType.FLOAT, ir.DataType.INT64


def route_tokens(
    op: Any,
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value,
    threshold: ir.Value,
    told: ir.Value,
    room: ir.Value,
    *,
    inclusive: bool,
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Return the decisions about tokens: those with sigmoid(score) + told above the threshold want to run.

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [B, S, H].
        weight: float32 [1, H].
        bias: float32 [1].
        threshold: float32 scalar.
        told: float32 [1, B, S], added to what is compared.
        room: int64 [1, B, 1], how many of a row's tokens may run, the first that want to.
        inclusive: whether the threshold itself is above it.

    Returns:
        The scores x . weight + bias, float32 [B, S, 1]; which tokens want to run and which run, bool [1, B, S]; whether
        any token runs, a bool scalar.
    """
    inputs = (x, weight, bias, threshold, told, room)
    made = op.RouteTokens(*inputs, _domain=DOMAIN, _outputs=4, inclusive=int(inclusive))
    rows, length = ("B", "S") if x.shape is None else x.shape[:2]
    line = [1, rows, length]
    score, wanted, chosen, runs = (
        _typed(value, dtype, dims)
        for value, dtype, dims in zip(
            made, (_FLOAT, _BOOL, _BOOL, _BOOL), ([rows, length, 1], line, line, []), strict=True
        )
    )
    return score, wanted, chosen, runs


def gather_tokens(op: Any, x: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the chosen tokens of all rows, concatenated, and their places.

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [B, S, H].
        chosen: bool [1, B, S].

    Returns:
        float32 [N, H], and int64 [N, 2], the row and the token.
    """
    line, places = op.GatherTokens(x, chosen, _domain=DOMAIN, _outputs=2)
    features = None if x.shape is None else x.shape[2]
    return _typed(line, _FLOAT, [None, features]), _typed(places, _INT64, [None, 2])


def scatter_gated(op: Any, x: ir.Value, y: ir.Value, score: ir.Value, places: ir.Value, *, sigmoid: bool) -> ir.Value:
    """Return x with x + gate * (y - x) at some places, float32 [B, S, H].

    Args:
        op: the builder of a graph, subgraph or function.
        x: float32 [B, S, H].
        y: float32 [N, H].
        score: float32 [B, S, 1].
        places: int64 [N, 2], the row and token of each of y, all different.
        sigmoid: whether the gate is the score's sigmoid, or the score.
    """
    made: ir.Value = op.ScatterGated(x, y, score, places, _domain=DOMAIN, sigmoid=int(sigmoid))
    made.type, made.shape = ir.TensorType(_FLOAT), x.shape
    return made


def _typed(value: ir.Value, dtype: ir.DataType, dims: list[Any]) -> ir.Value:
    """Declare what the builder does not infer for an unknown domain."""
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(dims)
    return value


__all__ = ["ROUTES", "gather_tokens", "route_tokens", "scatter_gated"]
