"""ONNX Runtime: one session per graph; a cache's input and output share a buffer, so that nothing is copied."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import ARRAY_TYPES, PART, PAST, PRESENT, Graph, Manifest
from dynexport.runtime.engines.cpu_operators import library_for
from dynexport.runtime.engines.engine import NO_CACHES, Caches, Engine, HostMemory, Prepared
from dynexport.runtime.engines.inputs import sizes_of

Array = np.ndarray
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# ONNX Runtime itself has no limit: it starts threads until memory runs out.
_MOST_THREADS = 256
# Microseconds for which workers of a file with parts wait awake; the runtime takes up to 0.1 ms between two calls.
_AWAKE = "1000"
# Bindings that an engine keeps per place of the caches: a server alternates between decode steps for a few row ranges
# and prompts.
_MOST_BINDINGS = 8


def check_threads(threads: int | None, *, needed: bool = False) -> None:
    """Raise DynexportError for an invalid number of threads, or for None if a number is needed."""
    if threads is not None or needed:
        checked_count("threads", threads, 1, _MOST_THREADS)


def waits_awake(manifest: Manifest) -> bool:
    """Return whether a bundle's worker threads wait awake: it has one session, or one with all layers' weights."""
    return len(manifest.graphs) == 1 or any(graph.part is not None for graph in manifest.graphs)


def check_provider(provider: str) -> None:
    """Raise DynexportError for an execution provider that the installed package lacks."""
    there = onnxruntime.get_available_providers()
    if provider not in there:
        raise DynexportError(
            f"onnxruntime: expected {provider}, found {', '.join(there)}; install onnxruntime-gpu in its place"
        )


class OnnxRuntimeEngine:
    """A session of one graph, or of the file that it is a part of.

    Args:
        path: the ONNX file; its external data is in the same directory.
        graph: the graph's entry in the manifest.
        threads: number of intra-op threads; None lets ONNX Runtime use one per physical core.
        profile: prefix of the profiler's file, or None to run without the profiler.
        alone: whether this is the only session; then its worker threads may spin between steps.
        model: ONNX bytes to load instead of the file; external data is still read from the file's directory.
        provider: execution provider; operators that it lacks run on the CPU, and caches stay in host memory.
        packed: whether weights are rearranged at load; false uses them from the mapped file.
        operators: the library of dynexport's CPU operators; None to run their bodies.

    Raises:
        DynexportError: when the graph is invalid, or its inputs differ from the manifest.
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
        provider: str = CPU,
        packed: bool = True,
        operators: Path | None = None,
    ) -> None:
        options = _options(graph, threads, profile, alone=alone, packed=packed)
        self._session = _open(path, graph, options, model=model, provider=provider, operators=operators)
        self._take(graph)

    def of_part(self, graph: Graph) -> OnnxRuntimeEngine:
        """Return an engine of another part of the same file, which shares the session."""
        other = copy.copy(self)
        other._take(graph)
        return other

    def _take(self, graph: Graph) -> None:
        self.graph = graph
        self._names = [spec.name for spec in graph.inputs if not spec.name.startswith(PAST)]
        self._others = _inputs_of_other_parts(self._session, graph)
        self._bound: dict[int | None, OrderedDict[Hashable, _Binding]] = {}

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """Run the graph once; see ``Engine.run``."""
        try:
            values = {name: inputs[name] for name in self._names}
            key = (caches.key, tuple(value.shape for value in values.values()))
            # Taken out while it runs: another thread meanwhile creates its own binding.
            known = self._bound.setdefault(caches.place, OrderedDict())
            bound = known.pop(key, None)
            if bound is None or bound.buffers is not caches.buffers:
                bound = _Binding(self._session, self.graph, values, caches, self._others)
            for name, value in values.items():
                bound.inputs[name][...] = value
            results = bound.run()
            if lasting:  # before another thread can take the binding
                results = {name: value.copy() for name, value in results.items()}
            known[key] = bound
            if len(known) > _MOST_BINDINGS:
                known.popitem(last=False)
            return results
        except DynexportError:
            raise
        except Exception as error:
            raise _failed(self.graph, error) from error

    def prepare(self, inputs: Mapping[str, Array], caches: Caches, *, shared: bool = False) -> Prepared:
        """Bind a call once; see ``Engine.prepare``."""
        values = {name: inputs[name] for name in self._names}
        return _Binding(self._session, self.graph, values, caches, self._others, shared=shared)

    def end_profiling(self) -> Path:
        """Write the profiler's file and return its path."""
        return Path(self._session.end_profiling())


def _options(graph: Graph, threads: int | None, profile: Path | None, *, alone: bool, packed: bool) -> Any:
    """Return the options of a session; arguments as for ``OnnxRuntimeEngine``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its exceptions carry the messages
    if threads is not None:
        options.intra_op_num_threads = int(threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # Keep weights out of the arena, which would round their memory up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_reuse = graph.share_memory
    if graph.profiles:
        # Graphs for TensorRT dequantise weights explicitly. Fusing would also round activations, and inside an If the
        # fused product does not find its weights.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if not alone:
        # Spinning workers of one session would take the cores from the other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if graph.part is not None:
        # A step is many calls: workers must be awake in the next one too.
        options.add_session_config_entry("session.intra_op.spin_duration_us", _AWAKE)
    if not packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _open(path: Path, graph: Graph, options: Any, *, model: bytes | None, provider: str, operators: Path | None) -> Any:
    """Return a session; arguments and errors as for ``OnnxRuntimeEngine``."""
    if provider == CPU and any(spec.dtype == "bfloat16" for spec in graph.inputs):
        raise DynexportError(
            f"{path}: expected float32 or float16 caches, found bfloat16, which ONNX Runtime's CPU provider cannot "
            "compute; convert with --precision fp16 or fp32, or build an engine with: dynexport build"
        )
    if model is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    try:
        if operators is not None:
            options.register_custom_ops_library(str(operators))
        # Without TensorFloat-32, which keeps only 11 significant bits.
        providers = [CPU] if provider == CPU else [(provider, {"use_tf32": "0"}), CPU]
        session = onnxruntime.InferenceSession(model or str(path), options, providers=providers)
    except Exception as error:  # as above
        raise DynexportError(f"{path}: ONNX Runtime refuses the graph: {_one_line(error)}") from error
    expected, found = {spec.name for spec in graph.inputs}, {node.name for node in session.get_inputs()}
    if graph.part is not None:  # those of other parts are given empty
        expected, found = expected | {PART}, (expected | {PART}) & found
    if found != expected:
        raise DynexportError(
            f"{path}: expected the inputs that the manifest names, found {sorted(found ^ expected)[0]!r:.80} "
            "in one of the two only"
        )
    return session


def _inputs_of_other_parts(session: Any, graph: Graph) -> dict[str, Array]:
    """Return the inputs of a file that a part of it does not take: empty, or scalars 0; and the part's number."""
    if graph.part is None:
        return {}
    own = {spec.name for spec in graph.inputs}
    others = {node.name: _emptied(node) for node in session.get_inputs() if node.name not in own}
    return others | {PART: np.array(graph.part, np.int64)}


def _emptied(node: Any) -> Array:
    element = node.type.removeprefix("tensor(").removesuffix(")")
    return np.zeros([dim if isinstance(dim, int) else 0 for dim in node.shape], ARRAY_TYPES[element])


class _Binding:
    """An I/O binding for one set of input shapes and cache rows; a step only writes the values of inputs.

    Attributes:
        buffers: the cache buffers that it is bound to.
        inputs: memory of the inputs, by name.
    """

    def __init__(
        self,
        session: Any,
        graph: Graph,
        inputs: dict[str, Array],
        caches: Caches,
        others: Mapping[str, Array],
        *,
        shared: bool = False,
    ) -> None:
        self.buffers = caches.buffers
        self.inputs = inputs if shared else {name: np.array(value, order="C") for name, value in inputs.items()}
        sizes = sizes_of(graph.inputs, inputs)
        self._session, self._graph = session, graph
        self._results: dict[str, Array] = {
            spec.name: np.empty(spec.sized(sizes), spec.array_type) for spec in graph.results
        }
        self._binding = session.io_binding()
        for name, value in [*self.inputs.items(), *others.items()]:
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        self._caches, self._shared = caches, dict[int | None, list[tuple[str, str, Any]]]()
        self._bind_caches()
        for name, value in self._results.items():
            self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def move(self, place: int) -> None:
        """Take the cache of another place from the next run on."""
        if place != self._caches.place:
            self._caches = replace(self._caches, place=place)
            self._bind_caches()

    def _bind_caches(self) -> None:
        place = self._caches.place
        if place not in self._shared:
            views = self._caches.views(self._graph.caches)
            self._shared[place] = [
                (PAST + name, PRESENT + name, onnxruntime.OrtValue.ortvalue_from_numpy(view))
                for name, view in views.items()
            ]
        for past, present, shared in self._shared[place]:
            self._binding.bind_ortvalue_input(past, shared)
            self._binding.bind_ortvalue_output(present, shared)

    def run(self) -> dict[str, Array]:
        """Run with the current values of the inputs; the next run overwrites the results."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise _failed(self._graph, error) from error
        return self._results


class OnnxRuntimeBackend(HostMemory):
    """ONNX Runtime sessions of a bundle's graphs; caches are in host memory for every provider.

    Attributes:
        grows: whether caches may be moved to larger buffers while they are in use.

    Args:
        bundle: the bundle whose graphs are run.
        threads: as for ``OnnxRuntimeEngine``.
        profile: as for ``OnnxRuntimeEngine``; the name of each graph is appended to the prefix.
        provider: as for ``OnnxRuntimeEngine``.
        packed: as for ``OnnxRuntimeEngine``.

    Raises:
        DynexportError: when the installed package lacks the provider.
    """

    def __init__(
        self, bundle: Bundle, threads: int | None, profile: Path | None, provider: str, *, packed: bool = True
    ) -> None:
        check_provider(provider)
        self.grows = provider == CPU
        self._bundle, self._threads, self._profile, self._provider = bundle, threads, profile, provider
        self._packed, self._files = packed, OpenFiles()
        self._alone = len(bundle.manifest.graphs) == 1
        self._in_parts = any(graph.part is not None for graph in bundle.manifest.graphs)
        # On a GPU, the bodies spare copies to the CPU and back.
        self._operators = library_for(bundle.manifest.operators) if provider == CPU else None

    def open(self, graph: Graph) -> Engine:
        """Load a graph."""
        return self._files.engine(graph, self._open_file)

    def _open_file(self, graph: Graph) -> OnnxRuntimeEngine:
        path, profile = self._bundle.path / graph.file, self._profile
        own = None if profile is None else profile.with_name(f"{profile.name}-{graph.name}")
        # Beside a file of parts, which has the weights of all layers, only a graph that decodes has much work, and not
        # at the same time.
        alone = self._alone or graph.part is not None or bool(graph.layers and self._in_parts)
        threads = 1 if graph.takes("forced_choices") else self._threads  # a router is too small for two
        return OnnxRuntimeEngine(
            path,
            graph,
            threads,
            own,
            alone=alone,
            provider=self._provider,
            packed=self._packed,
            operators=self._operators,
        )


class OpenFiles:
    """The engines that were opened first of each file with parts; its other parts share their sessions."""

    def __init__(self) -> None:
        self._first: dict[str, OnnxRuntimeEngine] = {}

    def engine(self, graph: Graph, open_file: Callable[[Graph], OnnxRuntimeEngine]) -> OnnxRuntimeEngine:
        """Return an engine of a graph; ``open_file`` opens its file."""
        if graph.part is None:
            return open_file(graph)
        if graph.file in self._first:
            return self._first[graph.file].of_part(graph)
        self._first[graph.file] = found = open_file(graph)
        return found


def _failed(graph: Graph, error: Exception) -> DynexportError:
    return DynexportError(f"{graph.file}: ONNX Runtime failed in a step: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
