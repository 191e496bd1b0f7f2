"""What runs a graph. Each file, or folder, is one engine."""
