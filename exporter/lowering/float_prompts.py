"""Let calls of several tokens per row attend in float, beside int8 caches that are rounded to after that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript import GraphBuilder

from dynexport.exporter.lowering.block_products import MICROSOFT

# Positions of the inputs of GroupQueryAttention.
_QUERY, _PAST_KEY, _PAST_VALUE, _LAST_INDEX, _TOTAL_LENGTH = 0, 3, 4, 5, 6
_FLOAT, _INT8, _INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT64


@dataclass(frozen=True)
class FloatPrompts:
    """A graph whose GroupQueryAttention nodes are given a branch for several tokens per row.

    Attributes:
        op: the graph's builder; it names no constants, as its names would be those that the graph has.
        several: bool [], whether the call has more than one token per row.
        zero: int64 [1].
        one: int64 [1].
        axis: int64 [1], the axis of the entries in a cache.
        least: float32 [], the least integer of an entry.
        most: float32 [], the largest one.
    """

    op: Any
    several: ir.Value
    zero: ir.Value
    one: ir.Value
    axis: ir.Value
    least: ir.Value
    most: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph) -> FloatPrompts:
        """Add to a graph with the input ``input_ids`` what all branches need."""
        arrays: dict[str, NDArray[Any]] = {
            "zero": np.zeros(1, np.int64),
            "one": np.ones(1, np.int64),
            "axis": np.array([2]),
            "least": np.array(-128, np.float32),
            "most": np.array(127, np.float32),
        }
        known = {name: constant(graph, f"int8_caches.{name}", array) for name, array in arrays.items()}
        (ids,) = (value for value in graph.inputs if value.name == "input_ids")
        first, before, op = graph[0], len(graph), GraphBuilder(graph).op
        several = op.Squeeze(op.Greater(op.Shape(ids, start=1, end=2), known["one"]))
        added = list(graph)[before:]
        graph.remove(added)
        graph.insert_before(first, added)
        return cls(op=op, several=several, **known)

    def attend(self, node: ir.Node, scales: Sequence[ir.Value]) -> None:
        """Put an ``If`` in the place of an attention node: the branch for several tokens per row, else the node.

        Args:
            node: GroupQueryAttention on float caches.
            scales: the scales of keys and values, float32 [1, kv_heads, 1, cache_head_dim].
        """
        outer, branch = node.graph, self._branch(node, scales)
        assert outer is not None
        chosen = ir.Node("", "If", [self.several], num_outputs=len(node.outputs), name=f"{node.name}_by_tokens")
        outer.insert_before(node, chosen)
        for old, new in zip(node.outputs, chosen.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}_of_one"
        ir.convenience.replace_all_uses_with(node.outputs, chosen.outputs, replace_graph_outputs=True)
        outer.remove(node)
        other = ir.Graph(
            [], node.outputs, nodes=[node], name=f"{node.name}_of_one", opset_imports=dict(branch.opset_imports)
        )
        chosen.attributes.add(ir.AttrGraph("then_branch", branch))
        chosen.attributes.add(ir.AttrGraph("else_branch", other))

    def _branch(self, node: ir.Node, scales: Sequence[ir.Value]) -> ir.Graph:
        """Return the branch for several tokens per row: it widens the entries in use, and the node appends and attends.

        For several tokens the node takes empty caches, or one row: so the new entries are the last of all rows.
        """
        caches, name = (node.inputs[_PAST_KEY], node.inputs[_PAST_VALUE]), f"{node.name}_of_several"

        def write(op: Any) -> list[ir.Value]:
            op.builder.push_module(name)
            count = op.Shape(node.inputs[_QUERY], start=1, end=2)
            total = op.Cast(op.Reshape(node.inputs[_TOTAL_LENGTH], self.one), to=_INT64)
            inputs = list(node.inputs)
            for place, cache, scale in zip((_PAST_KEY, _PAST_VALUE), caches, scales, strict=True):
                inputs[place] = op.Mul(op.Cast(op.Slice(cache, self.zero, total, self.axis), to=_FLOAT), scale)
            values = {attribute.name: attribute.value for attribute in node.attributes.values()}
            output, *present = op.GroupQueryAttention(*inputs, _domain=MICROSOFT, _outputs=3, **values)
            before = op.Sub(op.Cast(node.inputs[_LAST_INDEX], to=_INT64), op.Sub(count, self.one))
            written = []
            for cache, entries, scale in zip(caches, present, scales, strict=True):
                new = op.Slice(entries, op.Sub(total, count), total, self.axis)
                integers = op.Clip(op.Round(op.Div(new, scale)), self.least, self.most)
                written.append(op.TensorScatter(cache, op.Cast(integers, to=_INT8), before, axis=2))
            return [output, *written]

        branch: ir.Graph = self.op.builder.subgraph(write, [], [ir.Value() for _ in node.outputs], name=name)
        for result, like in zip(branch.outputs, node.outputs, strict=True):
            result.type, result.shape = like.type, like.shape
        return branch


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """Add a constant to a graph."""
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value


__all__ = ["FloatPrompts", "constant"]
