"""Operators of our own, each with a standard-op body, CUDA kernels and a TensorRT plugin (docs/plugins.md).

``graph`` calls them in a graph that is being built, ``functions`` has their ONNX forms, ``rtx`` gives TensorRT-RTX its
creators. Only the first two need onnxscript.
"""
