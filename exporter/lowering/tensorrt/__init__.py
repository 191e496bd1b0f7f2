"""Lower the graph's modules to what TensorRT and TensorRT-RTX take."""
