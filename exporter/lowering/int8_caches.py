"""Make the KV caches of finished ONNX Runtime graphs int8, with a fixed scale for each channel of each head.

An entry x is stored as clip(round_half_even(x / scale), -128, 127), and stands for its integer times the scale. With
dynexport's CachedAttention every token attends to stored values, those of its own call included. So it does with
GroupQueryAttention in a call of one token per row. With more tokens that kernel takes 3 to 5 times as long as with
float caches (docs/benchmarks.md, "int8 KV caches"), so these calls attend in float, and round their own keys and values
after that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dynexport.exporter.lowering.float_prompts import FloatPrompts, constant
from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.plugins.attention import INPUTS, NAME
from dynexport.runtime.bundle.manifest import PAST, PRESENT

_STOCK = "GroupQueryAttention"
# Positions of the inputs of attention: the cache of keys, and the scales of keys and values.
_PAST_KEY = {_STOCK: 3, NAME: 1}
_SCALES = {_STOCK: (12, 13), NAME: (INPUTS.index("key_scale"), INPUTS.index("value_scale"))}


@dataclass(frozen=True)
class CacheScales:
    """The scales of one cache's entries: an entry stands for its integer times the scale.

    Attributes:
        key: float32 [kv_heads, cache_head_dim].
        value: float32 [kv_heads, cache_head_dim].
    """

    key: NDArray[np.float32]
    value: NDArray[np.float32]


def make_caches_int8(model: ir.Model, scales: Mapping[int, CacheScales], *, runs_prompts: bool) -> None:
    """Change a graph with float32 caches, made for ONNX Runtime, into one with int8 caches.

    Args:
        model: the graph; it is changed in place.
        scales: the scales by place.
        runs_prompts: whether calls may have more than one token per row.

    Raises:
        BrokenGraph: when a cache is used by another operator than one of these, or not at all.
    """
    graph = model.graph
    nodes = [node for node in graph.all_nodes() if node.op_type in _PAST_KEY]
    caches = [value for value in graph.inputs if is_entry(str(value.name))]
    for cache in caches:
        _set_int8(cache)
    stock = any(node.op_type == _STOCK for node in nodes)
    prompts = FloatPrompts.of(graph) if runs_prompts and stock else None
    found: dict[str, ir.Value] = {}
    for node in nodes:
        place = _place(node)
        of_node = []
        for kind in ("key", "value"):
            name = scale_name(f"{PAST}{place}.{kind}")
            if name not in found:
                scale = getattr(scales[place], kind)[None, :, None, :]
                found[name] = constant(graph, name, scale.astype(np.float32))
            of_node.append(found[name])
        if prompts is not None and node.op_type == _STOCK:
            prompts.attend(node, of_node)
        _attend_to_stored(node, of_node)
    for value in graph.outputs:
        if is_entry(str(value.name)):
            _set_int8(value)
    if {str(value.name) for value in caches} != {name.removesuffix("_scale") for name in found}:
        raise BrokenGraph(f"{graph.name}: expected every cache to be one of an attention operator, found others")


def _place(node: ir.Node) -> int:
    """Return the place of the cache that an attention node reads."""
    at = _PAST_KEY[node.op_type]
    past = node.inputs[at]
    name = "" if past is None else str(past.name)
    place = name.removeprefix(PAST).removesuffix(".key")
    if not (name.startswith(PAST) and place.isdigit()):
        raise BrokenGraph(f"{node.name}: expected the cache of a place as input {at}, found {name}")
    return int(place)


def is_entry(name: str) -> bool:
    """Return whether an input or output of a graph holds the keys or values of a cache."""
    return name.startswith((PAST, PRESENT)) and name.endswith((".key", ".value"))


def scale_name(entries: str) -> str:
    """Return the name of the scale of a graph's input of keys or values."""
    return f"{entries}_scale"


def _attend_to_stored(node: ir.Node, scales: Sequence[ir.Value]) -> None:
    """Make an attention node one with int8 caches."""
    places = _SCALES[node.op_type]
    node.resize_inputs(max(len(node.inputs), places[1] + 1))
    for index, scale in zip(places, scales, strict=True):
        node.replace_input_with(index, scale)
    if node.op_type != _STOCK:
        return
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
    node.attributes.add(ir.AttrString("k_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrString("v_quant_type", "PER_CHANNEL"))


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
