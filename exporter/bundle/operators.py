"""Counts of the operators in a bundle's graphs: the standard's and dynexport's custom operators."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from dynexport.plugins.schema import DOMAIN
from dynexport.runtime.bundle.errors import DynexportError


def count_operators(path: Path) -> Counter[tuple[str, str]]:
    """Return the number of nodes per (domain, operator) of an ONNX file, branches included; weights are not read.

    Raises:
        DynexportError: when the file is no ONNX model.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's and onnx_ir's own classes
        raise DynexportError(f"{path}: expected an ONNX model, found: {' '.join(str(error).split())[:200]}") from error
    return Counter((node.domain, node.op_type) for node in graph.all_nodes())


def ours(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    """Return the number of nodes of each of dynexport's custom operators."""
    return {operator: count for (domain, operator), count in sorted(counts.items()) if domain == DOMAIN}


__all__ = ["count_operators", "ours"]
