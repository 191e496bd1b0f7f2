"""Who runs a bundle's graphs: ONNX Runtime, or TensorRT where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind, checked_path, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.engine import Engine
from dynexport.runtime.engines.onnxruntime import CPU, CUDA, OnnxRuntimeEngine, check_provider, check_threads

RunBackend = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
RUN_BACKENDS: tuple[RunBackend, ...] = get_args(RunBackend)
_PROVIDERS: dict[RunBackend, str] = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}
Opener: TypeAlias = Callable[[Graph], Engine]


def engine_opener(
    bundle: Bundle,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    *,
    profile: Path | None = None,
) -> Opener:
    """What opens the graphs of a bundle for one decoder: its engines share the memory of caches.

    Args:
        threads: intra-op threads of ONNX Runtime; None lets it take one per physical core.
        profile: prefix of the files that ONNX Runtime's profiler writes, one a graph, or None to run without it.

    Raises:
        DynexportError: when this bundle cannot run there; told before anything of it is loaded.
    """
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    check_backend(backend)
    check_threads(threads)
    if profile is not None:
        profile = checked_path("profile", profile)
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from dynexport.runtime.engines.tensorrt.opening import tensorrt_opener

        return tensorrt_opener(bundle, backend)
    provider = _PROVIDERS[backend]
    check_provider(provider)
    alone = len(bundle.manifest.graphs) == 1

    def open_engine(graph: Graph) -> Engine:
        own = None if profile is None else profile.with_name(f"{profile.name}-{graph.name}")
        return OnnxRuntimeEngine(bundle.path / graph.file, graph, threads, own, alone=alone, provider=provider)

    return open_engine


def check_backend(backend: str) -> None:
    """Raise DynexportError for one that we do not know."""
    if backend not in RUN_BACKENDS:
        raise DynexportError(f"backend: expected {', '.join(RUN_BACKENDS)}, found {shown(backend)}")


def backend_text(backend: RunBackend) -> str:
    """A backend in words: its version, and the GPU that it runs on.

    Raises:
        DynexportError: when it is not installed, or we know none of that name.
    """
    check_backend(backend)
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from dynexport.runtime.engines.tensorrt.backend import open_backend
        from dynexport.runtime.engines.tensorrt.gpu import find_gpu

        return f"{backend} {open_backend(backend).version} on {find_gpu()}"
    import onnxruntime

    provider = _PROVIDERS[backend]
    check_provider(provider)
    return f"ONNX Runtime {onnxruntime.__version__}{'' if provider == CPU else ', CUDA provider'}"


__all__ = ["RUN_BACKENDS", "Opener", "RunBackend", "backend_text", "engine_opener"]
