"""Draw the layers in which each token of a generation ran (docs/tracing.md)."""

from dynexport.exporter.trace.files import TraceFile
from dynexport.exporter.trace.model import RoutedLayer, RowDepth, Token, Trace

__all__ = ["RoutedLayer", "RowDepth", "Token", "Trace", "TraceFile"]
