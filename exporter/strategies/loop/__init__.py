"""Looped models: a stack of layers runs several times with the same weights, and a KV cache for each time."""

from dynexport.exporter.strategies.loop.strategy import STRATEGY

__all__ = ["STRATEGY"]
