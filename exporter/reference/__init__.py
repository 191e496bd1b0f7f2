"""Compute with PyTorch what a bundle should answer; importing this does not import PyTorch."""

from dynexport.exporter.reference.hugging_face import BoolArray, Reference, Runs, RunsFor
from dynexport.exporter.reference.oracle import (
    Answer,
    Case,
    KeptOracle,
    Oracle,
    RadialOracle,
    RoutedOracle,
    RowPaths,
    RowRoutes,
)
from dynexport.exporter.reference.unified_skip import unified_skip_runs

__all__ = [
    "Answer",
    "BoolArray",
    "Case",
    "KeptOracle",
    "Oracle",
    "RadialOracle",
    "Reference",
    "RoutedOracle",
    "RowPaths",
    "RowRoutes",
    "Runs",
    "RunsFor",
    "unified_skip_runs",
]
