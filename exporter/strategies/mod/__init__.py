"""Mixture-of-Depths: routed layers run the tokens that their routers choose."""

from dynexport.exporter.strategies.mod.strategy import STRATEGY

__all__ = ["STRATEGY"]
