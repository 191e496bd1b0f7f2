"""Backends that also show what every layer puts out, nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from dynexport.exporter.parity.arithmetic import keep_activations_float
from dynexport.exporter.parity.metrics import FloatArray
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph, TensorSpec
from dynexport.runtime.engines.engine import NO_CACHES, Array, Backend, Caches, Engine, HostMemory
from dynexport.runtime.engines.onnxruntime import OnnxRuntimeEngine

EMBEDDING = "embedding"
_PREFIX = "hidden_states."


class HiddenStates(HostMemory):
    """Opens a bundle's graphs of whole steps so that hidden states are outputs too, and keeps them.

    Attributes:
        calls: per run of a graph, float32 [B, S, hidden] after the embedding and after each layer of the model, by
            "embedding" and the layer's number; after a layer that the graph lacks they are what they were before it.
    """

    grows = True

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.bundle, self.threads = bundle, threads
        self.calls: list[dict[str, FloatArray]] = []

    def open(self, graph: Graph) -> Engine:
        return _ProbeEngine(graph, self)


class HopStates:
    """A backend whose graphs of a set are watched: what the first run of each gave.

    Attributes:
        shown: float32 [N, hidden], hidden states by the graph's name, of all tokens of that run.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self.grows = backend, backend.grows
        self.allocate, self.copy_row = backend.allocate, backend.copy_row
        self.shown: dict[str, FloatArray] = {}

    def open(self, graph: Graph) -> Engine:
        return _Recorded(self._backend.open(graph), self.shown)


class _Recorded:
    """An engine whose first hidden states are kept."""

    def __init__(self, engine: Engine, shown: dict[str, FloatArray]) -> None:
        self._engine, self._shown, self.graph = engine, shown, engine.graph

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        results = self._engine.run(inputs, caches, lasting=lasting)
        if "hidden_states_out" in results:
            self._shown.setdefault(self.graph.name, results["hidden_states_out"][0].astype(np.float32))
        return results

    def end_profiling(self) -> Path:
        return self._engine.end_profiling()


class _ProbeEngine(OnnxRuntimeEngine):
    """A session of a graph whose hidden states are outputs too."""

    def __init__(self, graph: Graph, probe: HiddenStates) -> None:
        self._probe, path, model = probe, probe.bundle.path / graph.file, probe.bundle.manifest.model
        self._shown_names = [f"{_PREFIX}{part}" for part in (EMBEDDING, *graph.layers)]
        (dtype,) = {spec.dtype for spec in graph.inputs if spec.name.endswith(".key")}  # caches hold what layers give
        shown = tuple(
            TensorSpec(name=name, dtype=dtype, shape=("B", "S", model.hidden_size)) for name in self._shown_names
        )
        graph = graph.model_copy(update={"outputs": (*graph.outputs, *shown)})
        super().__init__(path, graph, probe.threads, model=_with_outputs(path, self._shown_names, dtype))

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        results = super().run(inputs, caches, lasting=lasting)
        found = {name.removeprefix(_PREFIX): results[name].astype(np.float32) for name in self._shown_names}
        states = {EMBEDDING: found[EMBEDDING]}
        before = EMBEDDING
        for layer in map(str, range(self._probe.bundle.manifest.model.layers)):
            states[layer] = found.get(layer, states[before])
            before = layer
        self._probe.calls.append(states)
        return results


def _with_outputs(path: Path, names: Sequence[str], dtype: str) -> bytes:
    """The graph with these values as further outputs. Raises DynexportError when it lacks one."""
    number = getattr(onnx.TensorProto, dtype.upper())
    model = onnx.load(path, load_external_data=False)
    keep_activations_float(model.graph)  # what products round is no layer's fault
    produced = {output for node in model.graph.node for output in node.output}
    for name in names:
        if name not in produced:
            raise DynexportError(
                f"{path}: expected a value {name} to look for the layer that departs, found none; convert again"
            )
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, number, None))
    return bytes(model.SerializeToString())
