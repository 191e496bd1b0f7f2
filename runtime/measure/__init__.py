"""Measurements of a bundle: speed, minimal memory reads and FLOPs, perplexity, time by operator."""
