"""Backends that also record hidden states and change nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class ShownCall:
    """The hidden states of one graph call.

    Attributes:
        first: row of the cache that the call's first row is.
        positions: int64 [B, S], those of its tokens, padding included.
        states: float32 [B, S, hidden] after the embedding and after each layer of the model, by "embedding" and the
            layer's number. A layer that the graph lacks has the states of the layer before it.
    """

    first: int
    positions: Array
    states: Mapping[str, FloatArray]


class HiddenStates(HostMemory):
    """A backend that opens a bundle's graphs with the hidden states as additional outputs, and records them.

    Attributes:
        bundle: the bundle.
        threads: intra-op threads; None for the default.
        calls: what every graph call returned.
    """

    grows = True

    def __init__(self, bundle: Bundle, threads: int | None) -> None:
        self.bundle, self.threads = bundle, threads
        self.calls: list[ShownCall] = []

    def open(self, graph: Graph) -> Engine:
        return _ProbeEngine(graph, self)

    def of_row(self, name: str, row: int, length: int) -> FloatArray:
        """Return a row's hidden states, float32 [length, hidden], however its tokens were cut into calls.

        Padding stands at positions that the row's own tokens are written to later, or behind all of them.
        """
        found = np.full((length, self.bundle.manifest.model.hidden_size), np.nan, np.float32)
        for call in self.calls:
            if 0 <= row - call.first < len(call.positions):
                positions = call.positions[row - call.first]
                inside = positions < length
                found[positions[inside]] = call.states[name][row - call.first][inside]
        return found


class HopStates:
    """A backend that records the hidden states that each graph of a set returns in its first call.

    Attributes:
        shown: graph name -> float32 [N, hidden], hidden states of all N tokens of that call.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend, self.grows = backend, backend.grows
        self.allocate, self.copy_row = backend.allocate, backend.copy_row
        self.shown: dict[str, FloatArray] = {}

    def open(self, graph: Graph) -> Engine:
        return _Recorded(self._backend.open(graph), self.shown)


class _Recorded:
    """An engine that records the hidden states of its first call."""

    def __init__(self, engine: Engine, shown: dict[str, FloatArray]) -> None:
        self._engine, self._shown, self.graph = engine, shown, engine.graph

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        results = self._engine.run(inputs, caches, lasting=lasting)
        if "hidden_states_out" in results:
            self._shown.setdefault(self.graph.name, results["hidden_states_out"][0].astype(np.float32))
        return results

    def prepare(self, inputs: Mapping[str, Array], caches: Caches, *, shared: bool = False) -> None:
        return None

    def end_profiling(self) -> Path:
        return self._engine.end_profiling()


class _ProbeEngine(OnnxRuntimeEngine):
    """An ONNX Runtime engine with the hidden states as additional outputs."""

    def __init__(self, graph: Graph, probe: HiddenStates) -> None:
        self._probe, path, model = probe, probe.bundle.path / graph.file, probe.bundle.manifest.model
        self._shown_names = [f"{_PREFIX}{part}" for part in (EMBEDDING, *graph.layers)]
        (cached,) = {spec.dtype for spec in graph.inputs if spec.name.endswith(".key")}
        # For TensorRT, caches have the type of hidden states; for ONNX Runtime these are float32.
        dtype = "float" if probe.bundle.manifest.target == "onnxruntime" else cached
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
        self._probe.calls.append(ShownCall(caches.rows.start, inputs["position_ids"].copy(), states))
        return results


def _with_outputs(path: Path, names: Sequence[str], dtype: str) -> bytes:
    """Return the model with these values as additional outputs. Raises DynexportError if one is missing."""
    number = getattr(onnx.TensorProto, dtype.upper())
    model = onnx.load(path, load_external_data=False)
    keep_activations_float(model.graph)  # rounded activations are not an error of a layer
    produced = {output for node in model.graph.node for output in node.output}
    for name in names:
        if name not in produced:
            raise DynexportError(
                f"{path}: expected a value {name}, to find the layer that diverges, found none; convert again"
            )
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, number, None))
    return bytes(model.SerializeToString())
