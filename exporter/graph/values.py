"""Declare a graph's inputs, outputs and weights."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import nn

from dynexport.exporter.graph.layers import settle_storages, stored_weights
from dynexport.exporter.lowering.target import Target


def register_weights(graph: ir.Graph, model: nn.Module, target: Target) -> None:
    """Put every weight into the graph under its full name, in the storage that the target gives to it.

    onnxscript would name a parameter at its first use, by the scope of the outermost builder. Inside an ``If`` that
    scope lacks the layer, and the names of all layers would collide.
    """
    settle_storages(model, target)
    for name, weight in stored_weights(model):
        for suffix, value in weight.parts.items():
            value.name = name + suffix
            graph.initializers[value.name] = value


def typed_value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Return a new value of this type and shape."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def add_input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    """Add an input to the graph and return it."""
    value = typed_value(name, dtype, shape)
    graph.inputs.append(value)
    return value


def add_output(graph: ir.Graph, value: ir.Value, name: str, like: ir.Value) -> None:
    """Make a value an output, with the type and shape of another."""
    value.name, value.type, value.shape = name, like.type, like.shape
    graph.outputs.append(value)


__all__ = ["add_input", "add_output", "register_weights", "typed_value"]
