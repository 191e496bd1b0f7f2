"""Add calls of the operators to a graph, and the functions that a model with such calls needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import onnx_ir as ir

from dynexport.plugins import attention
from dynexport.plugins.functions import function
from dynexport.plugins.fused import FUSED
from dynexport.plugins.operators import (
    CAPACITY_TOP_K,
    GATED_SCATTER_ADD,
    OPERATORS,
    RAGGED_KV_APPEND,
    SELECTED_MATMUL,
)
from dynexport.plugins.products import PRODUCTS
from dynexport.plugins.products import function as product_function
from dynexport.plugins.routes import ROUTES
from dynexport.plugins.schema import DOMAIN, PLUGIN_ATTRIBUTES, VERSION, Operator, T
from dynexport.plugins.selections import SELECTIONS


def capacity_top_k(op: Any, scores: ir.Value, counts: ir.Value, slots: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Return the positions of the counts[b] largest scores of each row, at most K; ties go to the lower position.

    NaN and minus infinity are never chosen: mask a score by setting it to minus infinity.

    Args:
        op: the builder of a graph, subgraph or function.
        scores: float32 [B, S].
        counts: int64 [B].
        slots: int64 [K], 0, 1, .. K-1; its length is the capacity, at most S.

    Returns:
        positions int64 [B, K], the chosen ones ascending, then others; all positions of a row differ.
        valid int32 [B, K], 1 for chosen positions, else 0.
    """
    positions, valid = _call(op, CAPACITY_TOP_K, scores, counts, slots)
    return positions, valid


def gated_scatter_add(
    op: Any, residual: ir.Value, update: ir.Value, gate: ir.Value, positions: ir.Value, valid: ir.Value
) -> ir.Value:
    """Return residual, with gate * update added at the positions of valid slots: T [B, S, H].

    Args:
        op: the builder of a graph, subgraph or function.
        residual: T [B, S, H]; T is float32, float16 or bfloat16.
        update: T [B, K, H], any value where not valid.
        gate: T [B, K].
        positions: int64 [B, K]; all positions of a row differ.
        valid: int32 [B, K], 0 for slots that add nothing.
    """
    return _call(op, GATED_SCATTER_ADD, residual, update, gate, positions, valid)[0]


def ragged_kv_append(op: Any, cache: ir.Value, new: ir.Value, write_index: ir.Value, count: ir.Value) -> ir.Value:
    """Return the cache with the first count[b] entries of new written from write_index[b] on: T [B, h, M, D].

    Entries that would be outside of the cache are dropped.

    Args:
        op: the builder of a graph, subgraph or function.
        cache: T [B, h, M, D]; T is float32, float16 or bfloat16.
        new: T [B, h, K, D], K >= 1.
        write_index: int64 [B].
        count: int64 [B].
    """
    return _call(op, RAGGED_KV_APPEND, cache, new, write_index, count)[0]


def selected_matmul(op: Any, x: ir.Value, weight: ir.Value, index: ir.Value) -> ir.Value:
    """Return weight[index[n]] x[n] for every token n, or zeros if the index is -1: T [N, J].

    Args:
        op: the builder of a graph, subgraph or function.
        x: T [N, K]; T is float32, float16 or bfloat16.
        weight: T [L, J, K].
        index: int64 [N], 0 <= index < L; or -1, for which no weight is read.
    """
    return _call(op, SELECTED_MATMUL, x, weight, index)[0]


def add_functions(model: ir.Model) -> None:
    """Add to a model the functions that its graph, subgraphs and functions call, and import the domain."""
    left, added = [model.graph, *(body.graph for body in model.functions.values())], set[str]()
    while left:
        called = {node.op_type for node in left.pop().all_nodes() if node.domain == DOMAIN}
        for name in sorted(called & _BODIES.keys() - added):
            body = _body(name).clone()
            model.functions[body.identifier()] = body
            model.graph.opset_imports[DOMAIN] = VERSION
            left.append(body.graph)
            added.add(name)


_BODIES: dict[str, Callable[[], ir.Function]] = {
    **{operator.name: partial(function, operator) for operator in OPERATORS},
    **{product.name: partial(product_function, product) for product in (*PRODUCTS, *ROUTES, *FUSED, *SELECTIONS)},
    attention.NAME: attention.function,
}


@cache
def _body(name: str) -> ir.Function:
    """The function of an operator, made once: models take clones, in a tenth of the time."""
    return _BODIES[name]()


def _call(op: Any, operator: Operator, *inputs: ir.Value) -> Sequence[ir.Value]:
    count = len(operator.outputs)
    made = getattr(op, operator.name)(*inputs, _domain=DOMAIN, _outputs=count, **PLUGIN_ATTRIBUTES)
    outputs: Sequence[ir.Value] = [made] if count == 1 else made
    # The builder does not infer types and shapes for an unknown domain.
    generic = next((value.dtype for value, t in zip(inputs, operator.inputs, strict=True) if t.dtype == T), None)
    for value, tensor in zip(outputs, operator.outputs, strict=True):
        dtype = tensor.dtype if isinstance(tensor.dtype, ir.DataType) else generic
        value.type = None if dtype is None else ir.TensorType(dtype)
        dims = [_dim(inputs[place], axis) for place, axis in map(operator.source, tensor.dims)]
        value.shape = ir.Shape(dims)
    return outputs


def _dim(value: ir.Value, axis: int) -> int | ir.SymbolicDim:
    return ir.SymbolicDim(None) if value.shape is None else value.shape[axis]


__all__ = ["add_functions", "capacity_top_k", "gated_scatter_add", "ragged_kv_append", "selected_matmul"]
