"""Make the KV caches of finished ONNX Runtime graphs int8, with a fixed scale for each channel of each head.

GroupQueryAttention stores an entry x as clip(round_half_even(x / scale), -128, 127) and attends to the stored values,
the new tokens' included. So nothing but the node's type, its scales and the caches' types change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.runtime.bundle.manifest import PAST, PRESENT

# Positions of the node's inputs.
_PAST_KEY, _KEY_SCALE, _VALUE_SCALE = 3, 12, 13
_KINDS = {_KEY_SCALE: "key", _VALUE_SCALE: "value"}


@dataclass(frozen=True)
class CacheScales:
    """The scales of one cache's entries: an entry stands for its integer times the scale.

    Attributes:
        key: float32 [kv_heads, cache_head_dim].
        value: float32 [kv_heads, cache_head_dim].
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]


def make_caches_int8(model: ir.Model, scales: Mapping[int, CacheScales]) -> None:
    """Change a graph with float32 caches, made for ONNX Runtime, into one with int8 caches.

    Args:
        model: the graph; it is changed in place.
        scales: the scales by place.

    Raises:
        BrokenGraph: when a cache is used by another operator than GroupQueryAttention, or not at all.
    """
    graph = model.graph
    found: dict[str, ir.Value] = {}
    for node in [node for node in graph.all_nodes() if node.op_type == "GroupQueryAttention"]:
        place = _place(node)
        node.resize_inputs(_VALUE_SCALE + 1)
        for index, kind in _KINDS.items():
            name = scale_name(f"{PAST}{place}.{kind}")
            if name not in found:
                found[name] = _initializer(graph, name, getattr(scales[place], kind))
            node.replace_input_with(index, found[name])
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
        node.attributes.add(ir.AttrString("k_quant_type", "PER_CHANNEL"))
        node.attributes.add(ir.AttrString("v_quant_type", "PER_CHANNEL"))
    for value in (*graph.inputs, *graph.outputs):
        if is_entry(str(value.name)):
            _set_int8(value)
    inputs = {str(value.name) for value in graph.inputs if is_entry(str(value.name))}
    if inputs != {name.removesuffix("_scale") for name in found}:
        raise BrokenGraph(f"{graph.name}: expected every cache to be one of GroupQueryAttention, found others")


def _place(node: ir.Node) -> int:
    """Return the place of the cache that an attention node reads."""
    past = node.inputs[_PAST_KEY]
    name = "" if past is None else str(past.name)
    place = name.removeprefix(PAST).removesuffix(".key")
    if not (name.startswith(PAST) and place.isdigit()):
        raise BrokenGraph(f"{node.name}: expected the cache of a place as input {_PAST_KEY}, found {name}")
    return int(place)


def is_entry(name: str) -> bool:
    """Return whether an input or output of a graph holds the keys or values of a cache."""
    return name.startswith((PAST, PRESENT)) and name.endswith((".key", ".value"))


def scale_name(entries: str) -> str:
    """Return the name of the scale of a graph's input of keys or values."""
    return f"{entries}_scale"


def _initializer(graph: ir.Graph, name: str, scale: NDArray[np.float32]) -> ir.Value:
    """Add a scale, float32 [1, kv_heads, 1, cache_head_dim], to the graph."""
    tensor = ir.tensor(np.ascontiguousarray(scale[None, :, None, :], np.float32), name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.initializers[name] = value
    return value


def _set_int8(value: ir.Value) -> None:
    """Declare a cache int8, together with the results that it comes from: of attention, or of the branches of an If."""
    value.type = ir.TensorType(ir.DataType.INT8)
    producer = value.producer()
    if producer is None or producer.op_type != "If":
        return
    index = value.index()
    assert index is not None
    for branch in ("then_branch", "else_branch"):
        _set_int8(producer.attributes[branch].as_graph().outputs[index])


__all__ = ["CacheScales", "is_entry", "make_caches_int8", "scale_name"]
