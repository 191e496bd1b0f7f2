"""Custom operators, each with a body of standard operators, CUDA kernels and a TensorRT plugin (docs/plugins.md).

``graph`` adds calls of them to a graph, ``functions`` has their ONNX functions and schemas, ``creators`` registers
their TensorRT plugins, ``rtx`` loads TensorRT-RTX. Only the first two need onnxscript.
"""
