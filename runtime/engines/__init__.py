"""Run one graph with ONNX Runtime or TensorRT."""
