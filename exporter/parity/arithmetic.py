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
from dynexport.exporter.parity.ladder import Measurement, replayed
from dynexport.exporter.parity.thresholds import ROUTES, Kind
from dynexport.exporter.reference import Case, Oracle
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.engine import Engine
from dynexport.runtime.engines.onnxruntime import OnnxRuntimeEngine
from dynexport.runtime.execution.decoder import Decoder
from dynexport.runtime.execution.decoders import AnyDecoder
from dynexport.runtime.execution.loaded import Loaded
from dynexport.runtime.execution.path_decoder import PathDecoder
from dynexport.runtime.execution.single_path_decoder import SinglePathDecoder

_KINDS: dict[Kind, Kind] = {"reference": "arithmetic", "routes": "arithmetic_routes"}


def exact_decoder(bundle: Bundle, threads: int | None) -> AnyDecoder:
    """The bundle on ONNX Runtime's CPU provider, with activations that stay float32."""
    if bundle.manifest.single_graph is not None:
        return _ExactSinglePathDecoder(bundle, threads)
    if isinstance(bundle.manifest.contract, Radial):
        return _ExactPathDecoder(bundle, threads)
    return _ExactDecoder(bundle, threads)


def as_arithmetic(measured: Measurement) -> Measurement:
    """A comparison with the reference, made by ``exact_decoder`` and with rounded weights on both sides."""
    routes = "routes/" if measured.kind in ROUTES else ""
    name = f"{routes}arithmetic/{measured.name.removeprefix(routes)}"
    return replace(measured, name=name, kind=_KINDS.get(measured.kind, measured.kind))


def rounding(decoder: AnyDecoder, oracle: Oracle, prompts: Sequence[Prompt]) -> list[Measurement]:
    """What rounding activations inside products does: the bundle as it is, beside PyTorch with the same weights."""
    cases = [Case(tuple(prompt), ((0, len(prompt)),), decoder.bundle.speedup(1)) for prompt in prompts]
    return replayed("rounding/prompt", decoder, cases, oracle.answers(cases), kind="consistency")


class _Exact(Loaded):
    """Opens a bundle's graphs so that products keep their activations as they are."""

    def _engine(self, graph: Graph) -> Engine:
        if graph.name not in self._engines:
            path = self.bundle.path / graph.file
            self._engines[graph.name] = OnnxRuntimeEngine(
                path, graph, self.threads, alone=False, model=_with_float_activations(path)
            )
        return self._engines[graph.name]


class _ExactDecoder(_Exact, Decoder):
    """Of whole steps."""


class _ExactPathDecoder(_Exact, PathDecoder):
    """Of a set of graphs."""


class _ExactSinglePathDecoder(_Exact, SinglePathDecoder):
    """Of a single graph of all steps."""


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
