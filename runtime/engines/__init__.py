"""What runs a graph. Each file is one engine."""
