"""Radial Networks: a router sends every token to its next layer."""

from dynexport.exporter.strategies.radial.strategy import STRATEGY

__all__ = ["STRATEGY"]
