"""The operators in ONNX: local functions, which any engine can run, and schemas."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
from onnxscript import build_function

from dynexport.plugins.operators import OPERATORS
from dynexport.plugins.schema import DOMAIN, FLOATS, PLUGIN_ATTRIBUTES, VERSION, Operator, T, Tensor

OPSET = 24


def functions() -> list[ir.Function]:
    """Return the body of every operator as an ONNX local function."""
    return [function(operator) for operator in OPERATORS]


def schemas() -> list[onnx.defs.OpSchema]:
    """Return the ONNX schema of every operator, with type and shape inference; nothing is registered."""
    return [schema(operator) for operator in OPERATORS]


def function(operator: Operator) -> ir.Function:
    """Return an operator's body as an ONNX local function, which runs if there is no plugin."""
    made: ir.Function = build_function(
        operator.body,
        [ir.Value(name=tensor.name) for tensor in operator.inputs],
        domain=DOMAIN,
        name=operator.name,
        opset_imports={"": OPSET},
    )
    return made


def schema(operator: Operator) -> onnx.defs.OpSchema:
    """Return the ONNX schema of an operator."""
    generic = any(tensor.dtype == T for tensor in operator.inputs)
    made = onnx.defs.OpSchema(
        operator.name,
        DOMAIN,
        VERSION,
        operator.doc,
        inputs=[_parameter(tensor) for tensor in operator.inputs],
        outputs=[_parameter(tensor) for tensor in operator.outputs],
        attributes=[_attribute(name) for name in PLUGIN_ATTRIBUTES],
        type_constraints=[(T, [_type(dtype) for dtype in FLOATS], "hidden states, weights, caches")] if generic else [],
    )
    made.set_type_and_shape_inference_function(lambda context: _infer(operator, context))
    return made


def _parameter(tensor: Tensor) -> onnx.defs.OpSchema.FormalParameter:
    meaning = f"[{', '.join(tensor.dims)}]: {tensor.meaning}"
    return onnx.defs.OpSchema.FormalParameter(tensor.name, _type(tensor.dtype), meaning)


def _attribute(name: str) -> onnx.defs.OpSchema.Attribute:
    described = "selects the plugin that TensorRT's parser uses instead of the body; does not change results"
    return onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.STRING, described, required=False)


def _type(dtype: ir.DataType | str) -> str:
    return dtype if isinstance(dtype, str) else f"tensor({dtype.name.lower()})"


def _infer(operator: Operator, context: Any) -> None:
    types = [context.get_input_type(i).tensor_type for i in range(len(operator.inputs))]
    element = next((t.elem_type for t, tensor in zip(types, operator.inputs, strict=True) if tensor.dtype == T), 0)
    for i, tensor in enumerate(operator.outputs):
        inferred = onnx.TypeProto()
        inferred.tensor_type.elem_type = element if isinstance(tensor.dtype, str) else int(tensor.dtype)
        for letter in tensor.dims:
            place, axis = operator.source(letter)
            dim = inferred.tensor_type.shape.dim.add()
            if len(types[place].shape.dim) > axis:
                dim.CopyFrom(types[place].shape.dim[axis])
        context.set_output_type(i, inferred)


__all__ = ["OPSET", "function", "functions", "schema", "schemas"]
