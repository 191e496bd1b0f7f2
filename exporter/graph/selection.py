"""Which tokens have room, and where they stand: sizes that follow from the inputs' sizes, never from a choice."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import onnx_ir as ir


def capacity(op: Any, share: float, rounding: Literal["floor", "ceil"], tokens: ir.Value) -> ir.Value:
    """max(1, rounding(share * tokens)): an integer expression, so that no length can be baked into it.

    Args:
        share: the decimal number as written.
        tokens: int64 of any shape, which the result has too.
    """
    exact = Fraction(str(share))
    product = op.Mul(tokens, exact.numerator)
    if rounding == "ceil":
        product = op.Add(product, exact.denominator - 1)
    return op.Max(op.Div(product, exact.denominator), 1)


def chosen_first(op: Any, chosen: ir.Value, places: ir.Value, most: ir.Value) -> ir.Value:
    """Places of the first tokens of each row when the chosen ones come before the others, each in order.

    Args:
        chosen: bool [R, N].
        places: int64 [N], 0, 1, 2, ..
        most: int64 [1], how many of a row; at most N.

    Returns:
        int64 [R, most].
    """
    counted = op.Cast(chosen, to=ir.DataType.INT64)
    up_to = op.CumSum(counted, 1)
    others = op.Add(op.ReduceSum(counted, [1]), op.Sub(places, up_to))
    seat = op.Where(chosen, op.Sub(up_to, 1), others)
    # Every seat is taken once. TopK over distinct keys would do the same, where it has room for all tokens.
    order = op.ScatterElements(op.Mul(seat, 0), seat, op.Expand(places, op.Shape(seat)), axis=1)
    return op.Slice(order, [0], most, [1])


__all__ = ["capacity", "chosen_first"]
