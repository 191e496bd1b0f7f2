"""What a model of NVIDIA Triton Inference Server needs besides Triton: its tensors and its settings."""
