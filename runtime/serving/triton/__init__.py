"""Read the tensors and settings of a model of NVIDIA Triton Inference Server, and report its metrics."""
