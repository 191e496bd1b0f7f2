"""The decoder as ``onnxscript.nn`` modules with Hugging Face names; a target chooses the ONNX operators."""
