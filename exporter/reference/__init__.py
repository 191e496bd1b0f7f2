"""Compute the expected results of a bundle with PyTorch; importing this package does not import PyTorch."""

from dynexport.exporter.reference.hugging_face import BoolArray, Reference, Runs, RunsFor
from dynexport.exporter.reference.oracle import Answer, Case, KeptOracle, Oracle
from dynexport.exporter.reference.rows import RowPaths, RowRoutes

__all__ = [
    "Answer",
    "BoolArray",
    "Case",
    "KeptOracle",
    "Oracle",
    "Reference",
    "RowPaths",
    "RowRoutes",
    "Runs",
    "RunsFor",
]
