"""Radial Networks: a router chooses every token's next layer."""

from dynexport.exporter.strategies.radial.strategy import STRATEGY

__all__ = ["STRATEGY"]
