"""Arithmetic checks of int4 and int8 bundles: both the bundle and PyTorch use the rounded weights.

Such a bundle differs from its checkpoint in two ways: weights are rounded, and MatMulNBits and QMoE round activations
to int8 inside their kernels. The two errors together are so large that they hide a missing MLP. So the bundle's graphs
run once more with float32 activations, and PyTorch runs with the bundle's dequantised weights. The remaining difference
is that of float32 arithmetic and is held to its limits.
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
    """A backend that opens a bundle's graphs with float32 activations in products of blocks."""

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
    """Make every product of blocks keep its input in float32, also in subgraphs.

    ``accuracy_level`` 0 does so, but not in QMoE of 8 bits, whose experts become float32 in front of a MoE.
    """
    changed: list[Any] = []
    for node in graph.node:
        attributes = {attribute.name: attribute for attribute in node.attribute}
        for attribute in attributes.values():
            if attribute.type == onnx.AttributeProto.GRAPH:
                keep_activations_float(attribute.g)
        if node.op_type in ("MatMulNBits", "QMoE") and "accuracy_level" in attributes:
            attributes["accuracy_level"].i = 0
        if node.op_type == "QMoE" and attributes["expert_weight_bits"].i == 8:
            changed += _float_experts(node, attributes["block_size"].i)
        else:
            changed.append(node)
    del graph.node[:]
    graph.node.extend(changed)


def _float_experts(node: Any, block_size: int) -> list[Any]:
    """Return the nodes that compute a QMoE with symmetric weights of 8 bits by float32 experts."""
    made: list[Any] = []

    def add(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{node.output[0]}/float_experts/{len(made)}"
        made.append(onnx.helper.make_node(kind, inputs, [name], **attributes))
        return name

    def numbers(*values: int, kind: int = onnx.TensorProto.INT64) -> str:
        shape = [len(values)] if kind == onnx.TensorProto.INT64 else []
        return add("Constant", value=onnx.helper.make_tensor("", kind, shape, values))

    def matrices(quantized: str, scales: str) -> str:
        integers = add("Cast", quantized, to=onnx.TensorProto.FLOAT)
        integers = add("Sub", integers, numbers(128, kind=onnx.TensorProto.FLOAT))
        blocks = add("Reshape", integers, numbers(0, 0, -1, block_size))
        return add("Reshape", add("Mul", blocks, add("Unsqueeze", scales, numbers(-1))), numbers(0, 0, -1))

    x, scores, gate_up, gate_up_scales, gate_up_bias, down, down_scales, *rest = node.input
    inputs = [x, scores, matrices(gate_up, gate_up_scales), gate_up_bias, matrices(down, down_scales), *rest[:1]]
    products = onnx.helper.make_node("MoE", inputs, node.output, domain=node.domain)
    unknown = ("expert_weight_bits", "block_size", "accuracy_level")
    products.attribute.extend(attribute for attribute in node.attribute if attribute.name not in unknown)
    return [*made, products]
