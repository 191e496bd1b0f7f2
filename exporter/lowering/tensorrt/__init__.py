"""Lower the graph's modules to operators that TensorRT and TensorRT-RTX accept."""
