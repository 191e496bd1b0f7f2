"""ONNX Runtime: one session per graph, caches bound to the same buffer on both sides so that nothing is copied."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import PAST, PRESENT, Graph
from dynexport.runtime.engines.engine import NO_CACHES, Caches, Engine, HostMemory, Prepared
from dynexport.runtime.engines.inputs import sizes_of

Array = np.ndarray
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# ONNX Runtime would start as many as it is told, until memory ends.
_MOST_THREADS = 256
# Bindings that an engine keeps: a server's steps are for as many ranges of rows, prompts in between.
_MOST_BINDINGS = 8


def check_threads(threads: int | None, *, needed: bool = False) -> None:
    """Raise DynexportError for a number of threads that makes no sense, or None where one is needed."""
    if threads is not None or needed:
        checked_count("threads", threads, 1, _MOST_THREADS)


def check_provider(provider: str) -> None:
    """Raise DynexportError for one that the installed package lacks."""
    there = onnxruntime.get_available_providers()
    if provider not in there:
        raise DynexportError(
            f"onnxruntime: expected {provider}, found {', '.join(there)}; install onnxruntime-gpu in its place"
        )


class OnnxRuntimeEngine:
    """A session of one graph.

    Args:
        path: the ONNX file, its external data beside it.
        graph: its entry in the manifest.
        threads: intra-op threads; None lets ONNX Runtime take one per physical core.
        profile: prefix of a profile to write, or None.
        alone: whether no other session runs in turn with this one: then its workers may wait for the next step awake.
        model: bytes to take instead of the file's; external data is looked for beside it all the same.
        provider: what computes; the CPU does what another one cannot, and caches stay in its memory.

    Raises:
        DynexportError: for a graph that is none, or not the manifest's.
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
    ) -> None:
        self._session = _open(path, graph, threads, profile, alone=alone, model=model, provider=provider)
        self.graph = graph
        self._names = [spec.name for spec in graph.inputs if not spec.name.startswith(PAST)]
        self._bound: OrderedDict[Hashable, _Binding] = OrderedDict()

    def run(self, inputs: Mapping[str, Array], caches: Caches = NO_CACHES, *, lasting: bool = True) -> dict[str, Array]:
        """As ``Engine`` says."""
        try:
            values = {name: inputs[name] for name in self._names}
            key = (caches.key, tuple(value.shape for value in values.values()))
            # Taken out while it runs: a thread that comes meanwhile makes one of its own.
            bound = self._bound.pop(key, None)
            if bound is None or bound.buffers is not caches.buffers:
                bound = _Binding(self._session, self.graph, values, caches)
            for name, value in values.items():
                bound.inputs[name][...] = value
            results = bound.run()
            if lasting:  # before another thread can take the binding
                results = {name: value.copy() for name, value in results.items()}
            self._bound[key] = bound
            if len(self._bound) > _MOST_BINDINGS:
                self._bound.popitem(last=False)
            return results
        except DynexportError:
            raise
        except Exception as error:
            raise _failed(self.graph, error) from error

    def prepare(self, inputs: Mapping[str, Array], caches: Caches) -> Prepared:
        """As ``Engine`` says."""
        return _Binding(self._session, self.graph, {name: inputs[name] for name in self._names}, caches)

    def end_profiling(self) -> Path:
        """Write the profile; its path."""
        return Path(self._session.end_profiling())


def _open(
    path: Path,
    graph: Graph,
    threads: int | None,
    profile: Path | None = None,
    *,
    alone: bool,
    model: bytes | None = None,
    provider: str,
) -> Any:
    """A session; arguments and errors as for ``OnnxRuntimeEngine``."""
    if provider == CPU and any(spec.dtype == "bfloat16" for spec in graph.inputs):
        raise DynexportError(
            f"{path}: expected float32 or float16 caches, found bfloat16, which ONNX Runtime's CPU provider cannot "
            "compute; convert with --precision fp16 or fp32, or build an engine with: dynexport build"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what it has to say comes with its exceptions
    if threads is not None:
        options.intra_op_num_threads = int(threads)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # Weights outside the arena, which would round their memory up.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    options.enable_mem_reuse = graph.share_memory
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
        # Without TensorFloat-32, which leaves eleven bits of a float32.
        providers = [CPU] if provider == CPU else [(provider, {"use_tf32": "0"}), CPU]
        session = onnxruntime.InferenceSession(model or str(path), options, providers=providers)
    except Exception as error:  # as above
        raise DynexportError(f"{path}: ONNX Runtime refuses the graph: {_one_line(error)}") from error
    expected, found = {spec.name for spec in graph.inputs}, {node.name for node in session.get_inputs()}
    if found != expected:
        raise DynexportError(
            f"{path}: expected the inputs that the manifest names, found {sorted(found ^ expected)[0]!r:.80} "
            "in one of the two only"
        )
    return session


class _Binding:
    """Inputs of one shape, results and the rows of some caches, bound once: a step then only writes inputs' values.

    Attributes:
        buffers: the caches that it is bound to.
        inputs: the memory of the inputs, by name.
    """

    def __init__(self, session: Any, graph: Graph, inputs: dict[str, Array], caches: Caches) -> None:
        self.buffers = caches.buffers
        self.inputs = {name: np.array(value, order="C") for name, value in inputs.items()}
        sizes = sizes_of(graph.inputs, inputs)
        self._session, self._graph = session, graph
        self._results: dict[str, Array] = {
            spec.name: np.empty(spec.sized(sizes), spec.array_type) for spec in graph.results
        }
        self._binding = session.io_binding()
        for name, value in self.inputs.items():
            self._binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        for name, buffer in caches.views(graph.caches).items():
            shared = onnxruntime.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(f"{PAST}{name}", shared)
            self._binding.bind_ortvalue_output(f"{PRESENT}{name}", shared)
        for name, value in self._results.items():
            self._binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))

    def run(self) -> dict[str, Array]:
        """Run with the values that the inputs have; the next run writes over the results."""
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime raises a class of its own for each status code
            raise _failed(self._graph, error) from error
        return self._results


class OnnxRuntimeBackend(HostMemory):
    """Sessions of a bundle's graphs; caches lie in the memory of the host, whatever computes.

    Attributes:
        grows: whether caches may be put into larger memory while they are in use.

    Args:
        bundle: whose graphs they are.
        threads, profile, provider: as for ``OnnxRuntimeEngine``; each graph's profile has a name of its own.

    Raises:
        DynexportError: for a provider that the installed package lacks.
    """

    def __init__(self, bundle: Bundle, threads: int | None, profile: Path | None, provider: str) -> None:
        check_provider(provider)
        self.grows = provider == CPU
        self._bundle, self._threads, self._profile, self._provider = bundle, threads, profile, provider
        self._alone = len(bundle.manifest.graphs) == 1

    def open(self, graph: Graph) -> Engine:
        """Load a graph."""
        path, profile = self._bundle.path / graph.file, self._profile
        own = None if profile is None else profile.with_name(f"{profile.name}-{graph.name}")
        return OnnxRuntimeEngine(path, graph, self._threads, own, alone=self._alone, provider=self._provider)


def _failed(graph: Graph, error: Exception) -> DynexportError:
    return DynexportError(f"{graph.file}: ONNX Runtime failed in a step: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
