"""Draw which token ran where: the tokens of a generation against the layers of its model (docs/tracing.md)."""

from dynexport.exporter.trace.files import TraceFile
from dynexport.exporter.trace.model import RoutedLayer, RowDepth, Token, Trace

__all__ = ["RoutedLayer", "RowDepth", "Token", "Trace", "TraceFile"]
