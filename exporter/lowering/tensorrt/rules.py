"""Check a finished graph for operators that TensorRT refuses, before an engine is built.

Every rule was measured with TensorRT-RTX 1.7 (docs/tensorrt.md, "The lowering"); builds in the tests confirm the list.
"""

from __future__ import annotations

import onnx_ir as ir

from dynexport.exporter.lowering.target import BrokenGraph
from dynexport.plugins.schema import DOMAIN

# ONNX operators that these graphs use; none has a result whose shape depends on values.
_ACCEPTED = frozenset(
    {"Abs", "Add", "And", "Attention", "Cast", "Concat", "Constant", "Cos", "CumSum", "DequantizeLinear", "Div"}
    | {
        "Equal",
        "Exp",
        "Expand",
        "Gather",
        "GatherElements",
        "GatherND",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "If",
    }
    | {"LayerNormalization", "Less", "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Not", "Or", "RMSNormalization"}
    | {"Range", "ReduceMax", "ReduceMin", "ReduceSum", "Relu", "Reshape", "RotaryEmbedding", "ScatterElements", "Shape"}
    | {"Sigmoid", "Sin", "Slice", "Softmax", "Split", "Squeeze", "Sub", "Swish", "Tanh", "TensorScatter", "TopK"}
    | {"Transpose", "Unsqueeze", "Where", "Xor"}
)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def check_accepted(graph: ir.Graph) -> None:
    """Raise BrokenGraph for a node that TensorRT refuses, or computes differently from the ONNX standard."""
    for node in graph.all_nodes():
        if node.domain == DOMAIN:
            continue
        if node.domain or node.op_type not in _ACCEPTED:
            raise _broken(node, "TensorRT has no such operator")
        if node.op_type.startswith("Scatter") and _text(node, "reduction", "none") != "none":
            raise _broken(node, f"expected the reduction none, found {_text(node, 'reduction', 'none')}")
        if node.op_type.startswith("Reduce") and any(
            value and value.dtype == ir.DataType.BOOL for value in node.inputs
        ):
            raise _broken(node, "expected numbers, found booleans, which TensorRT does not reduce")
        if node.op_type == "TensorScatter":
            _check_append(graph, node)
        if node.op_type == "Attention":
            _check_attention(graph, node)


def _check_append(graph: ir.Graph, node: ir.Node) -> None:
    """Check a cache update: the engine does it in place, so the cache must be a graph input of fixed size."""
    cache, result = node.inputs[0], node.outputs[0]
    if cache not in graph.inputs or result not in graph.outputs:
        raise _broken(node, "expected an input of the graph for the cache and an output for the result")
    if cache is None or cache.shape is None or len(cache.shape) != 4 or cache.dtype not in _FLOATS:
        raise _broken(node, "expected a cache [B, heads, slots, head_dim] of floats")
    if not isinstance(cache.shape[2], int):
        raise _broken(node, f"expected a fixed number of slots, found {cache.shape[2]}")
    axis = node.attributes.get("axis")
    if _text(node, "mode", "linear") != "linear" or (axis.as_int() if axis is not None else -2) not in (-2, 2):
        raise _broken(node, "expected the mode linear and the axis of the slots")


def _check_attention(graph: ir.Graph, node: ir.Node) -> None:
    if node.graph is not graph:
        raise _broken(node, "TensorRT builds no Attention inside an If")
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        raise _broken(node, "expected query, key, value and a mask, and the attention alone as its output")
    refused = {"softcap", "softmax_precision", "qk_matmul_output_mode"} & set(node.attributes)
    if refused:
        raise _broken(node, f"TensorRT refuses the attribute {sorted(refused)[0]}")


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _broken(node: ir.Node, problem: str) -> BrokenGraph:
    return BrokenGraph(f"{node.name} ({node.op_type}): {problem}")


__all__ = ["check_accepted"]
