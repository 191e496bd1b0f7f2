"""Round float32 matrices to 4-bit integers with small errors."""
