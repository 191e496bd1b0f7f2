"""Our own ONNX operators: schema, standard-op body, kernels. There are none yet: dense and unified-skip need no more
than ONNX Runtime has."""
