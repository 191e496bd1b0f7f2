"""Whether an int4 or int8 bundle computes with its rounded weights what PyTorch computes with the same ones.

Two things make such a bundle differ from its checkpoint: weights are rounded, and MatMulNBits rounds activations to
int8 inside its kernel. Both together hide a whole MLP that is left out. So the bundle's graphs run once more with
``accuracy_level`` 0, which keeps activations float32 and is all that changes, and PyTorch runs with the weights as the
bundle holds them: what is left is float32 arithmetic, and is judged as that.
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
from dynexport.runtime.engines.onnxruntime import OnnxRuntimeEngine
from dynexport.runtime.execution.executor import Executor

_KINDS: dict[Kind, Kind] = {"reference": "arithmetic", "routes": "arithmetic_routes"}


def exact_executor(bundle: Bundle, threads: int | None) -> Executor:
    """The bundle on ONNX Runtime's CPU provider, with activations that stay float32."""
    return Executor(bundle, threads, wrap=lambda _: _ExactBackend(bundle, threads))


def as_arithmetic(measured: Measurement) -> Measurement:
    """A comparison with the reference, made by ``exact_executor`` and with rounded weights on both sides."""
    routes = "routes/" if measured.kind in ROUTES else ""
    name = f"{routes}arithmetic/{measured.name.removeprefix(routes)}"
    return replace(measured, name=name, kind=_KINDS.get(measured.kind, measured.kind))


def rounding(executor: Executor, oracle: Oracle, prompts: Sequence[Prompt]) -> list[Measurement]:
    """What rounding activations inside products does: the bundle as it is, beside PyTorch with the same weights."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), executor.manifest.full) for prompt in prompts]
    return replayed("rounding/prompt", executor, cases, oracle.answers(cases), kind="consistency")


class _ExactBackend(HostMemory):
    """Opens a bundle's graphs so that products keep their activations as they are."""

    grows = True

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self._path, self._threads = bundle.path, threads

    def open(self, graph: Graph) -> Engine:
        path = self._path / graph.file
        return OnnxRuntimeEngine(path, graph, self._threads, alone=False, model=_with_float_activations(path))


def _with_float_activations(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    keep_activations_float(model.graph)
    return bytes(model.SerializeToString())


def keep_activations_float(graph: Any) -> None:
    """Let every MatMulNBits compute in float32, in branches as well."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                keep_activations_float(attribute.g)
            elif node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
