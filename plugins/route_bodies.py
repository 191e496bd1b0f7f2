"""The bodies of the operators of routed layers, in standard ONNX operators; graphs without ours use them too."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

_BOOL, _INT64 = int(ir.DataType.BOOL), int(ir.DataType.INT64)


def route_tokens(
    op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value, threshold: ir.Value, told: ir.Value, room: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """Return the decisions of a router; see ``routes.route_tokens``."""
    score = op.Add(op.MatMul(x, op.Transpose(weight, perm=[1, 0])), bias)
    compared = op.Add(op.Sigmoid(op.Transpose(score, perm=[2, 0, 1])), told)
    equal = op.And(op.Equal(compared, threshold), _flag(op, "inclusive"))
    wanted = op.Or(op.Greater(compared, threshold), equal)
    rank = op.CumSum(op.Cast(wanted, to=_INT64), op.Constant(value_int=2))
    chosen = op.And(wanted, op.LessOrEqual(rank, room))
    return score, wanted, chosen, op.ReduceMax(chosen, keepdims=0)


def gather_tokens(op: Any, x: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the chosen tokens [N, H] of x [B, S, H] and chosen [1, B, S], and their places int64 [N, 2]."""
    places = op.Transpose(op.NonZero(op.Squeeze(chosen, [0])), perm=[1, 0])
    return op.GatherND(x, places), places


def scatter_gated(op: Any, x: ir.Value, y: ir.Value, score: ir.Value, places: ir.Value) -> ir.Value:
    """Return x with x + gate * (y - x) at the places; see ``routes.scatter_gated``."""
    gate = op.GatherND(score, places)
    gate = op.Where(_flag(op, "sigmoid"), op.Sigmoid(gate), gate)
    return add_gated(op, x, op.GatherND(x, places), y, gate, places)


def add_gated(op: Any, x: ir.Value, before: ir.Value, y: ir.Value, gate: ir.Value, places: ir.Value) -> ir.Value:
    """Return x [B, S, H] with x + gate * (y - x) at the places, where x is ``before``; gate is [N, 1]."""
    change = op.Mul(gate, op.Sub(y, before))
    after: ir.Value = op.ScatterND(x, places, change, reduction="add")
    return after


def _flag(op: Any, name: str) -> Any:
    """Return an integer attribute of the call, 0 or 1, as bool."""
    return op.Cast(op.Constant(value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT)), to=_BOOL)


__all__ = ["add_gated", "gather_tokens", "route_tokens", "scatter_gated"]
