"""An ONNX ``If``: what is not run reads no weights and leaves no cache entry."""

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
) -> tuple[ir.Value, LayerCache]:
    """``run(op)`` where the condition holds, else hidden_states and cache as they are.

    The cache passes the other branch through ``Identity``, which copies nothing where input and output are bound to
    one buffer.

    Args:
        condition: bool scalar.
        run: writes a layer, with the builder that it gets.
        name: of the layer, for the names of the branches.
    """

    def run_layer(op: Any) -> list[ir.Value]:
        output, present = run(op)
        return [output, *present.values()]

    def skip_layer(op: Any) -> list[ir.Value]:
        return [op.Identity(value) for value in (hidden_states, *cache.values())]

    output, *present = either(op, condition, run_layer, skip_layer, 1 + len(cache.values()), name)
    return output, LayerCache(*present)


def either(
    op: Any, condition: ir.Value, run: WriteBranch, skip: WriteBranch, count: int, name: str
) -> Sequence[ir.Value]:
    """``count`` values of the one branch where the condition holds, else of the other.

    Args:
        condition: bool scalar.
        run, skip: write a branch, with the builder that they get.
        name: for the names of the branches.
    """

    # In a scope of their own: a subgraph counts its values from 0, and names must differ from those outside.
    def branch(write: WriteBranch, scope: str) -> ir.Graph:
        def trace(op: Any) -> Sequence[ir.Value]:
            op.builder.push_module(scope)
            return write(op)

        return op.builder.subgraph(trace, [], [ir.Value() for _ in range(count)], name=scope)

    then_branch, else_branch = branch(run, f"{name}_run"), branch(skip, f"{name}_skip")
    outputs: Sequence[ir.Value] = op.If(condition, then_branch=then_branch, else_branch=else_branch, _outputs=count)
    for output, inner in zip(outputs, then_branch.outputs, strict=True):
        output.type = inner.type
    return outputs
