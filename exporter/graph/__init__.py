"""The decoder as ``onnxscript.nn`` modules under Hugging Face names; a target says which operators they become."""
