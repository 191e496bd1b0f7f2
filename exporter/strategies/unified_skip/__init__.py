"""Unified Layer Skipping: the prompt at full depth, generated tokens in the kept layers only."""

from dynexport.exporter.strategies.unified_skip.strategy import STRATEGY, kept_by_order, kept_layers

__all__ = ["STRATEGY", "kept_by_order", "kept_layers"]
