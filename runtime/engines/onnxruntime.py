"""ONNX Runtime: one session per graph, caches bound to the same buffer on both sides so that nothing is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynexport.runtime.cache import Cache
from dynexport.runtime.engines.inputs import sizes_of, wanted_inputs
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph, TensorSpec

Array = np.ndarray


class Engine:
    """A session of one graph.

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
        self._session = _open(path, graph, threads, profile, alone=alone, model=model)
        self.graph = graph
        self._inputs = {spec.name for spec in graph.inputs}
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
        inputs = wanted_inputs(self.graph, inputs)
        try:
            if self._bound is None or not self._bound.fits(cache, inputs):
                self._bound = _Binding(self._session, cache, inputs, self._inputs, self._results)
            return self._bound.run(self._session, inputs)
        except Exception as error:  # as above
            raise DynexportError(f"{self.graph.file}: ONNX Runtime failed in a step: {_one_line(error)}") from error

    def end_profiling(self) -> Path:
        """Write the profile; its path."""
        return Path(self._session.end_profiling())


class Part:
    """A session of one graph of a set, without caches.

    Args:
        path: the ONNX file, its external data beside it.
        graph: its entry in the manifest.
        threads, profile: as for ``Engine``.
    """

    def __init__(self, path: Path, graph: Graph, threads: int | None = None, profile: Path | None = None) -> None:
        self._session = _open(path, graph, threads, profile, alone=False)
        self._graph = graph
        self._bound: _PartBinding | None = None

    def __call__(self, *inputs: Array) -> list[Array]:
        """The outputs, in the manifest's order, for inputs in that order; the next call writes over them."""
        try:
            if self._bound is None or not self._bound.fits(inputs):
                self._bound = _PartBinding(self._session, self._graph, inputs)
            return self._bound.run(self._session, inputs)
        except Exception as error:  # as above
            raise DynexportError(f"{self._graph.file}: ONNX Runtime failed in a step: {_one_line(error)}") from error

    def end_profiling(self) -> Path:
        """Write the profile; its path."""
        return Path(self._session.end_profiling())


class _PartBinding:
    """Inputs of one shape and the outputs that follow from it, bound once."""

    def __init__(self, session: Any, graph: Graph, inputs: tuple[Array, ...]) -> None:
        names = (spec.name for spec in graph.inputs)
        sizes = sizes_of(graph.inputs, dict(zip(names, inputs, strict=True)))
        self._inputs = [np.array(value, order="C") for value in inputs]
        self._outputs: list[Array] = [np.empty(spec.sized(sizes), spec.array_type) for spec in graph.outputs]
        self._binding = session.io_binding()
        for spec, value in zip(graph.inputs, self._inputs, strict=True):
            self._binding.bind_ortvalue_input(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for spec, value in zip(graph.outputs, self._outputs, strict=True):
            self._binding.bind_ortvalue_output(spec.name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def fits(self, inputs: tuple[Array, ...]) -> bool:
        """Whether a call has inputs of these shapes."""
        return all(value.shape == own.shape for value, own in zip(inputs, self._inputs, strict=True))

    def run(self, session: Any, inputs: tuple[Array, ...]) -> list[Array]:
        """Run with these values."""
        for own, value in zip(self._inputs, inputs, strict=True):
            own[...] = value
        session.run_with_iobinding(self._binding)
        return self._outputs


class Attention:
    """A session of the graph that appends to a cache and attends to it, for caches that are told with every call."""

    def __init__(self, path: Path, graph: Graph, threads: int | None = None, profile: Path | None = None) -> None:
        self._session = _open(path, graph, threads, profile, alone=False)
        self._file = graph.file
        self._inputs = [spec.name for spec in graph.inputs if not spec.name.startswith("past_key_values.")]
        self._bound: dict[int, _AttentionBinding] = {}

    def run(self, place: int, buffers: dict[str, Array], rows: slice, inputs: dict[str, Array]) -> Array:
        """Attention [B, C, heads * head_dim]; the cache is read and written in place, the next call at the place
        writes over the result.

        Args:
            place: what the cache belongs to; for each place the last binding is kept.
            buffers: the cache's parts by name; other buffers come in another dict.
            rows: of the buffers, B of them.
            inputs: by name; those that the graph lacks are left out.
        """
        wanted = {name: inputs[name] for name in self._inputs}
        try:
            bound = self._bound.get(place)
            if bound is None or not bound.fits(buffers, rows, wanted):
                bound = self._bound[place] = _AttentionBinding(self._session, buffers, rows, wanted)
            return bound.run(self._session, wanted)
        except Exception as error:  # as above
            raise DynexportError(f"{self._file}: ONNX Runtime failed in a step: {_one_line(error)}") from error

    def end_profiling(self) -> Path:
        """Write the profile; its path."""
        return Path(self._session.end_profiling())


class _AttentionBinding:
    """A cache and inputs of one shape, bound once."""

    def __init__(self, session: Any, buffers: dict[str, Array], rows: slice, inputs: dict[str, Array]) -> None:
        self._buffers, self._rows = buffers, rows
        self._inputs = {name: np.array(value, order="C") for name, value in inputs.items()}
        self._output = np.empty_like(self._inputs["query"])
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for part, buffer in buffers.items():
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(buffer[rows])
            self._binding.bind_ortvalue_input(f"past_key_values.{part}", shared)
            self._binding.bind_ortvalue_output(f"present.{part}", shared)
        self._binding.bind_ortvalue_output("attention", onnxruntime.OrtValue.ortvalue_from_numpy(self._output))

    def fits(self, buffers: dict[str, Array], rows: slice, inputs: dict[str, Array]) -> bool:
        """Whether a call has this memory for its cache, and inputs of these shapes."""
        same = buffers is self._buffers and rows == self._rows
        return same and all(value.shape == self._inputs[name].shape for name, value in inputs.items())

    def run(self, session: Any, inputs: dict[str, Array]) -> Array:
        """Run with these values."""
        for name, value in inputs.items():
            self._inputs[name][...] = value
        session.run_with_iobinding(self._binding)
        return self._output


def _open(
    path: Path,
    graph: Graph,
    threads: int | None,
    profile: Path | None = None,
    *,
    alone: bool,
    model: bytes | None = None,
) -> Any:
    """A session; arguments as for ``Engine``. Raises DynexportError for a graph that is none, or not the manifest's."""
    if any(spec.dtype == "bfloat16" for spec in graph.inputs):
        raise DynexportError(
            f"{path}: expected float32 or float16 caches, found bfloat16, which ONNX Runtime's CPU provider cannot "
            "compute; convert with --precision fp16 or fp32, or build an engine with: dynexport build"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes with its exceptions
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # Weights outside the arena, which would round their memory up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if graph.role == "paths":
        # Of thousands of nodes: planning which of them could share memory takes time that grows with the square of
        # their number, and saves none (docs/architecture.md, "One graph of all steps").
        options.enable_mem_reuse = False
    if graph.profiles:
        # Weights of TensorRT's graphs are dequantised as the file says: a fused product would round activations as
        # well, and inside an If its weights are not found.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not alone:
        # Spinning workers of one session would take the cores from the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        session = onnxruntime.InferenceSession(model or str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises a class of its own for each status code
        raise DynexportError(f"{path}: ONNX Runtime refuses the graph: {_one_line(error)}") from error
    expected, found = {spec.name for spec in graph.inputs}, {node.name for node in session.get_inputs()}
    if found != expected:
        raise DynexportError(
            f"{path}: expected the inputs that the manifest names, found {sorted(found ^ expected)[0]!r:.80} "
            "in one of the two only"
        )
    return session


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
        self._results = [(spec.name, spec.sized(sizes), spec.array_type) for spec in results]
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
