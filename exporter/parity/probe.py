"""A decoder that also shows what every layer puts out: the bundle's graphs with more outputs, nothing else changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from dynexport.exporter.parity.metrics import FloatArray
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.cache import Cache
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.engines.onnxruntime import Array, Engine
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph

EMBEDDING = "embedding"
_PREFIX = "hidden_states."


class ProbeDecoder(Decoder):
    """A decoder that remembers hidden states.

    Attributes:
        calls: per run of a graph, float32 [B, S, hidden] after the embedding and after each layer of the model, by
            "embedding" and the layer's number; after a layer that the graph lacks they are what they were before it.
    """

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        super().__init__(bundle, threads)
        self.calls: list[dict[str, FloatArray]] = []

    def _engine(self, name: str) -> Engine:
        if name not in self._engines:
            graph = next(graph for graph in self.manifest.graphs if graph.name == name)
            self._engines[name] = _ProbeEngine(self.bundle.path / graph.file, graph, self)
        return self._engines[name]


class _ProbeEngine(Engine):
    """A session of a graph whose hidden states are outputs too."""

    def __init__(self, path: Path, graph: Graph, decoder: ProbeDecoder) -> None:
        self._decoder = decoder
        self._names = [f"{_PREFIX}{part}" for part in (EMBEDDING, *graph.layers)]
        self._session = _session(path, self._names, decoder.threads)
        self.graph = graph
        self._inputs = {spec.name for spec in graph.inputs}
        self._bound: tuple[Cache, Any] | None = None

    def run(self, cache: Cache, inputs: dict[str, Array]) -> Array:
        logits = super().run(cache, inputs)
        assert self._bound is not None
        # Outputs come in the order in which they were bound.
        values = self._bound[1].get_outputs()[-len(self._names) :]
        found = {name.removeprefix(_PREFIX): value.numpy() for name, value in zip(self._names, values, strict=True)}
        states = {EMBEDDING: found[EMBEDDING]}
        before = EMBEDDING
        for layer in map(str, range(self._decoder.manifest.model.layers)):
            states[layer] = found.get(layer, states[before])
            before = layer
        self._decoder.calls.append(states)
        return logits

    def _binding(self, cache: Cache) -> Any:
        binding = super()._binding(cache)
        for name in self._names:
            binding.bind_output(name, "cpu")
        return binding


def _session(path: Path, names: Sequence[str], threads: int | None) -> onnxruntime.InferenceSession:
    """The graph with these values as further outputs. Raises DynexportError when it lacks one."""
    model = onnx.load(path, load_external_data=False)
    produced = {output for node in model.graph.node for output in node.output}
    for name in names:
        if name not in produced:
            raise DynexportError(
                f"{path}: expected a value {name} to look for the layer that departs, found none; convert again"
            )
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
