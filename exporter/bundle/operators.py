"""Which operators a bundle's graphs have: the standard's, and our own, for which TensorRT may have a plugin."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from dynexport.plugins.schema import DOMAIN
from dynexport.runtime.bundle.errors import DynexportError


def count_operators(path: Path) -> Counter[tuple[str, str]]:
    """(domain, operator) -> nodes of an ONNX file, those in branches among them; weights are not read.

    Raises:
        DynexportError: when the file is no ONNX model.
    """
    try:
        graph = ir.load(path).graph
    except Exception as error:  # protobuf's and onnx_ir's own classes
        raise DynexportError(f"{path}: expected an ONNX model, found: {' '.join(str(error).split())[:200]}") from error
    return Counter((node.domain, node.op_type) for node in graph.all_nodes())


def ours(counts: Counter[tuple[str, str]]) -> dict[str, int]:
    """Of our own operators, how many nodes each has."""
    return {operator: count for (domain, operator), count in sorted(counts.items()) if domain == DOMAIN}


__all__ = ["count_operators", "ours"]
