"""Arithmetic checks of int4 and int8 bundles: both the bundle and PyTorch use the rounded weights.

Such a bundle differs from its checkpoint in two ways: weights are rounded, and MatMulNBits rounds activations to int8
inside its kernel. The two errors together are so large that they hide a missing MLP. So the bundle's graphs run once
more with ``accuracy_level`` 0, which keeps activations in float32, and PyTorch runs with the bundle's dequantised
weights. The remaining difference is that of float32 arithmetic and is held to its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from dynexport.exporter.parity.cases import Prompt
from dynexport.exporter.parity.comparison import Measurement, replayed
from dynexport.exporter.parity.thresholds import ROUTES, Kind
from dynexport.exporter.reference import Case, Oracle
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.engine import Engine, HostMemory
from dynexport.runtime.engines.onnxruntime import OnnxRuntimeEngine, OpenFiles
from dynexport.runtime.execution.executor import Executor

_KINDS: dict[Kind, Kind] = {"reference": "arithmetic", "routes": "arithmetic_routes"}


def exact_executor(bundle: Bundle, threads: int | None) -> Executor:
    """Return an executor on ONNX Runtime's CPU provider that keeps activations in float32."""
    return Executor(bundle, threads, wrap=lambda _: _ExactBackend(bundle, threads))


def as_arithmetic(measured: Measurement) -> Measurement:
    """Return a comparison that was made with ``exact_executor`` and rounded weights as an arithmetic check."""
    routes = "routes/" if measured.kind in ROUTES else ""
    name = f"{routes}arithmetic/{measured.name.removeprefix(routes)}"
    return replace(measured, name=name, kind=_KINDS.get(measured.kind, measured.kind))


def rounding(executor: Executor, oracle: Oracle, prompts: Sequence[Prompt]) -> list[Measurement]:
    """Measure the effect of rounded activations: the unchanged bundle against PyTorch with the same weights."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), executor.manifest.full) for prompt in prompts]
    return replayed("rounding/prompt", executor, cases, oracle.answers(cases), kind="consistency")


class _ExactBackend(HostMemory):
    """A backend that opens a bundle's graphs with float32 activations in MatMulNBits."""

    grows = True

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._path, self._threads = bundle.path, threads
        self._files = OpenFiles()

    def open(self, graph: Graph) -> Engine:
        return self._files.engine(graph, self._open_file)

    def _open_file(self, graph: Graph) -> OnnxRuntimeEngine:
        path = self._path / graph.file
        return OnnxRuntimeEngine(path, graph, self._threads, alone=False, model=_with_float_activations(path))


def _with_float_activations(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    keep_activations_float(model.graph)
    return bytes(model.SerializeToString())


def keep_activations_float(graph: Any) -> None:
    """Set ``accuracy_level`` 0 on every MatMulNBits, also in subgraphs."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                keep_activations_float(attribute.g)
            elif node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
