"""Run one graph. Each file, or folder, is one engine."""
