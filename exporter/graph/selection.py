"""Select the tokens that run within a capacity; result shapes depend on input shapes only, not on values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import onnx_ir as ir


def capacity(op: Any, share: float, rounding: Literal["floor", "ceil"], tokens: ir.Value) -> ir.Value:
    """Return max(1, rounding(share * tokens)), an integer expression without a constant length.

    Args:
        share: the share of tokens; its decimal digits are exact.
        rounding: the direction of rounding.
        tokens: int64 of any shape; the result has the same shape.
    """
    exact = Fraction(str(share))
    product = op.Mul(tokens, exact.numerator)
    if rounding == "ceil":
        product = op.Add(product, exact.denominator - 1)
    return op.Max(op.Div(product, exact.denominator), 1)


def chosen_first(op: Any, chosen: ir.Value, places: ir.Value, most: ir.Value) -> ir.Value:
    """Return the places of each row's first tokens, chosen tokens before the others and each group in order.

    Args:
        chosen: bool [R, N].
        places: int64 [N], 0, 1, 2, ..
        most: int64 [1], number of tokens per row; at most N.

    Returns:
        int64 [R, most].
    """
    counted = op.Cast(chosen, to=ir.DataType.INT64)
    up_to = op.CumSum(counted, 1)
    others = op.Add(op.ReduceSum(counted, [1]), op.Sub(places, up_to))
    seat = op.Where(chosen, op.Sub(up_to, 1), others)
    # Each seat is unique within its row. TopK over distinct keys gives the same order, within TopK's size limit.
    order = op.ScatterElements(op.Mul(seat, 0), seat, op.Expand(places, op.Shape(seat)), axis=1)
    return op.Slice(order, [0], most, [1])


__all__ = ["capacity", "chosen_first"]
