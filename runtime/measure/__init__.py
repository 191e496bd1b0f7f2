"""Measure a bundle: speed, perplexity, where time goes, thresholds."""
