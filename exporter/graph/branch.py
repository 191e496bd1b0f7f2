"""An ONNX ``If`` around a layer: a skipped layer reads no weights and writes no cache entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.step import LayerCache

WriteBranch = Callable[[Any], Sequence[ir.Value]]


def run_if(
    op: Any,
    condition: ir.Value,
    run: Callable[[Any], tuple[ir.Value, LayerCache]],
    hidden_states: ir.Value,
    cache: LayerCache,
    name: str,
    *,
    skip: Callable[[Any], ir.Value] | None = None,
) -> tuple[ir.Value, LayerCache]:
    """Run a layer if the condition is true; otherwise return hidden_states and cache unchanged.

    In the skip branch the cache passes through ``Identity``, which copies nothing if input and output share one
    buffer.

    Args:
        condition: bool scalar.
        run: writes the layer with the builder it receives.
        hidden_states: [B, S, hidden], the layer's input.
        cache: the layer's cache.
        name: the layer's name, a prefix of the branch names.
        skip: writes what a skipped layer returns instead of hidden_states.

    Returns:
        The hidden states and the cache after the layer.
    """

    def run_layer(op: Any) -> list[ir.Value]:
        output, present = run(op)
        return [output, *present.values()]

    def skip_layer(op: Any) -> list[ir.Value]:
        output = op.Identity(hidden_states) if skip is None else skip(op)
        return [output, *(op.Identity(value) for value in cache.values())]

    output, *present = either(op, condition, run_layer, skip_layer, 1 + len(cache.values()), name)
    return output, LayerCache(*present)


def either(
    op: Any, condition: ir.Value, run: WriteBranch, skip: WriteBranch, count: int, name: str
) -> Sequence[ir.Value]:
    """Write an ``If`` node and return its ``count`` outputs.

    Args:
        condition: bool scalar.
        run: writes the branch for true with the builder it receives.
        skip: writes the branch for false, likewise.
        count: number of outputs of each branch.
        name: prefix of the branch names.
    """

    # Each branch has its own name scope: a subgraph numbers its values from 0, and names must be unique in the model.
    def branch(write: WriteBranch, scope: str) -> ir.Graph:
        def trace(op: Any) -> Sequence[ir.Value]:
            op.builder.push_module(scope)
            return write(op)

        return op.builder.subgraph(trace, [], [ir.Value() for _ in range(count)], name=scope)

    then_branch, else_branch = branch(run, f"{name}_run"), branch(skip, f"{name}_skip")
    found = op.If(condition, then_branch=then_branch, else_branch=else_branch, _outputs=count)
    outputs: Sequence[ir.Value] = [found] if isinstance(found, ir.Value) else found
    for output, inner in zip(outputs, then_branch.outputs, strict=True):
        output.type = inner.type
    return outputs
