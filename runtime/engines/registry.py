"""Choose what runs a bundle's graphs: ONNX Runtime, or TensorRT where there is a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind, checked_path, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.engine import Backend
from dynexport.runtime.engines.onnxruntime import CPU, CUDA, OnnxRuntimeBackend, check_provider, check_threads

RunBackend = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx"]
RUN_BACKENDS: tuple[RunBackend, ...] = get_args(RunBackend)
_PROVIDERS: dict[RunBackend, str] = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}


def open_backend(
    bundle: Bundle,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    *,
    profile: Path | None = None,
) -> Backend:
    """Open what runs the graphs of a bundle; they share the memory of caches.

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
        from dynexport.runtime.engines.tensorrt.opening import TensorRtBackend

        return TensorRtBackend(bundle, backend)
    return OnnxRuntimeBackend(bundle, threads, profile, _PROVIDERS[backend])


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


__all__ = ["RUN_BACKENDS", "RunBackend", "backend_text", "open_backend"]
