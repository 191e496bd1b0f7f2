"""Measure a bundle: speed, the least that it must read and compute, perplexity, where time goes."""
