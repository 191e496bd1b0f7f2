"""ONNX Runtime: one session per graph, caches bound to the same buffer on both sides so that nothing is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynexport.runtime.cache import Cache
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph, TensorSpec

Array = np.ndarray
_DTYPES = {"float": np.float32, "int64": np.int64, "bool": np.bool_}


class Engine:
    """A session of one graph.

    Attributes:
        layers: int64, the layers of the graph, ascending.

    Args:
        path: the ONNX file, its external data beside it.
        graph: its entry in the manifest.
        threads: intra-op threads; None lets ONNX Runtime take one per physical core.
        profile: prefix of a profile to write, or None.
        alone: whether no other session runs in turn with this one: then its workers may wait for the next step awake.
        model: bytes to take instead of the file's; external data is looked for beside it all the same.
    """

    def __init__(
        self,
        path: Path,
        graph: Graph,
        threads: int | None = None,
        profile: Path | None = None,
        *,
        alone: bool = True,
        model: bytes | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what it has to say comes with its exceptions
        if threads is not None:
            options.intra_op_num_threads = threads
        if profile is not None:
            options.enable_profiling, options.profile_file_prefix = True, str(profile)
        # Weights outside the arena, which would round their memory up.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        if not alone:
            # Spinning workers of one session would take the cores from the other.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            self._session = onnxruntime.InferenceSession(
                model or str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise DynexportError(f"{path}: ONNX Runtime refuses the graph: {_one_line(error)}") from error
        self.graph = graph
        self.layers = np.array(graph.layers)
        self._inputs = {spec.name for spec in graph.inputs}
        found = {node.name for node in self._session.get_inputs()}
        if found != self._inputs:
            raise DynexportError(
                f"{path}: expected the inputs that the manifest names, found {sorted(found ^ self._inputs)[0]!r:.80} "
                "in one of the two only"
            )
        self._results = tuple(spec for spec in graph.outputs if not spec.name.startswith("present."))
        self._bound: _Binding | None = None

    def run(self, cache: Cache, inputs: dict[str, Array]) -> dict[str, Array]:
        """One step; the cache's buffers are read and written in place.

        Args:
            inputs: arrays by name, as the manifest describes them, for all layers of the model; those that the graph
                lacks are left out.

        Returns:
            All outputs but the caches, by name: ``logits`` float32 [B, K, vocab]; of a routed graph also ``routes``,
            ``route_scores``, ``route_margins`` and ``overflow``.
        """
        inputs = {name: self._of_layers(name, value) for name, value in inputs.items() if name in self._inputs}
        try:
            if self._bound is None or not self._bound.fits(cache, inputs):
                self._bound = _Binding(self._session, cache, inputs, self._inputs, self._results)
            return self._bound.run(self._session, inputs)
        except Exception as error:  # as above
            raise DynexportError(f"{self.graph.file}: ONNX Runtime failed in a step: {_one_line(error)}") from error

    def _of_layers(self, name: str, value: Array) -> Array:
        """What has a row for each layer of the model, with the rows of the graph's layers."""
        by_layer = name in ("cache_lengths", "layer_active")
        return value[self.layers] if by_layer and len(value) > len(self.layers) else value

    def end_profiling(self) -> str:
        """Write the profile; its path."""
        return str(self._session.end_profiling())


class _Binding:
    """Inputs of one shape and the buffers of one cache, bound once: a step then only writes the inputs' values."""

    def __init__(
        self,
        session: Any,
        cache: Cache,
        inputs: dict[str, Array],
        known: set[str],
        results: tuple[TensorSpec, ...],
    ) -> None:
        self._cache = cache
        rows, count = inputs["input_ids"].shape
        sizes = {"B": rows, "S": count, "K": inputs["logits_indices"].shape[1]}
        self._results = [
            (spec.name, [sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape], _DTYPES[spec.dtype])
            for spec in results
        ]
        self._inputs = {name: np.array(value, order="C") for name, value in inputs.items()}
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, buffer in cache.buffers.items():
            if f"past_key_values.{name}" in known:
                shared = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
                self._binding.bind_ortvalue_input(f"past_key_values.{name}", shared)
                self._binding.bind_ortvalue_output(f"present.{name}", shared)

    def fits(self, cache: Cache, inputs: dict[str, Array]) -> bool:
        """Whether a step has this cache and inputs of these shapes."""
        return cache is self._cache and all(value.shape == self._inputs[name].shape for name, value in inputs.items())

    def run(self, session: Any, inputs: dict[str, Array]) -> dict[str, Array]:
        """Run with these values; every result is an array of its own."""
        for name, value in inputs.items():
            self._inputs[name][...] = value
        found: dict[str, Array] = {}
        for name, shape, dtype in self._results:
            found[name] = np.empty(shape, dtype)
            self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(found[name]))
        session.run_with_iobinding(self._binding)
        return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
