"""Write decisions about whole sequences: a row's first prompt decides, and the length of the layer's cache tells."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.step import FLOAT
from dynexport.exporter.lowering.target import cast
from dynexport.exporter.strategies.mod.routing import Routing


def mean_of_prompt(op: Any, x: ir.Value, routing: Routing) -> ir.Value:
    """Return the mean [B, 1, hidden] of a row's real tokens, for x [B, S, hidden]."""
    real = op.Cast(op.Transpose(routing.real, perm=[1, 2, 0]), to=FLOAT)
    counts = op.Cast(op.Max(op.Unsqueeze(routing.token_counts, [1, 2]), 1), to=FLOAT)
    mean: ir.Value = op.Div(op.ReduceSum(op.Mul(cast(op, x, FLOAT), real), [1]), counts)
    return mean


def of_every_token(
    op: Any, score: ir.Value, position_ids: ir.Value, cache_length: ir.Value, routing: Routing
) -> tuple[ir.Value, ir.Value]:
    """Return score and logit [B, S, 1] of every token from a first prompt's score [B, 1, 1].

    Later tokens of a sequence have the score 0, and a logit of infinity if the layer's cache has entries, else minus
    infinity.

    Args:
        op: writes operators into the graph.
        score: float32 [B, 1, 1], the router's result for the mean of the row's tokens.
        position_ids: int64 [B, S].
        cache_length: int64 [B], entries in the layer's cache before the step.
        routing: the shared values.
    """
    first = op.Equal(op.Unsqueeze(op.ReduceMin(position_ids, [1]), [2]), 0)
    entries = op.Unsqueeze(op.Greater(cache_length, 0), [1, 2])
    told = op.Where(first, score, op.Where(entries, math.inf, -math.inf))
    shape = op.Concat(op.Shape(routing.real, start=1), [1], axis=0)
    return op.Expand(op.Where(first, score, 0.0), shape), op.Expand(told, shape)


__all__ = ["mean_of_prompt", "of_every_token"]
