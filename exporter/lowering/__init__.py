"""Lower the graph's modules to the operators of an engine, ONNX Runtime or TensorRT."""
