"""An ONNX ``If`` around a layer: what is not run reads no weights and leaves no cache entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from dynexport.exporter.graph.step import LayerCache

RunBranch = Callable[[Any], tuple[ir.Value, LayerCache]]


def run_if(
    op: Any, condition: ir.Value, run: RunBranch, hidden_states: ir.Value, cache: LayerCache, name: str
) -> tuple[ir.Value, LayerCache]:
    """``run(op)`` where the condition holds, else hidden_states and cache as they are.

    The cache passes the other branch through ``Identity``, which copies nothing where input and output are bound to
    one buffer.

    Args:
        condition: bool scalar.
        run: writes the branch, with the builder that it gets.
        name: of the layer, for the names of the branches.
    """

    # In a scope of their own: a subgraph counts its values from 0, and names must differ from those outside.
    def run_branch(op: Any) -> list[ir.Value]:
        op.builder.push_module(f"{name}_run")
        output, present = run(op)
        return [output, *present.values()]

    def skip_branch(op: Any) -> list[ir.Value]:
        op.builder.push_module(f"{name}_skip")
        return [op.Identity(value) for value in (hidden_states, *cache.values())]

    count = 1 + len(cache.values())
    then_branch, else_branch = (
        op.builder.subgraph(trace, [], [ir.Value() for _ in range(count)], name=f"{name}_{kind}")
        for kind, trace in (("run", run_branch), ("skip", skip_branch))
    )
    outputs = op.If(condition, then_branch=then_branch, else_branch=else_branch, _outputs=count)
    for output, inner in zip(outputs, then_branch.outputs, strict=True):
        output.type = inner.type
    return outputs[0], LayerCache(*outputs[1:])
