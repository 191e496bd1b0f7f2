"""Open the backend that runs a bundle's graphs: ONNX Runtime, or TensorRT on a GPU."""

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
Weights = Literal["packed", "mapped"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_PROVIDERS: dict[RunBackend, str] = {"onnxruntime": CPU, "onnxruntime-cuda": CUDA}


def open_backend(
    bundle: Bundle,
    backend: RunBackend = "onnxruntime",
    threads: int | None = None,
    *,
    profile: Path | None = None,
    weights: Weights = "packed",
) -> Backend:
    """Return the backend that runs the graphs of a bundle.

    Args:
        bundle: an opened bundle.
        backend: name of the backend.
        threads: number of ONNX Runtime's intra-op threads; None lets it use one per physical core.
        profile: prefix of the files of ONNX Runtime's profiler, one per graph; None to run without the profiler.
        weights: "packed" rearranges the weights at load for the fastest steps, a copy of each process's own. "mapped"
            uses them as they lie in the file: they load in no time, and processes share them.

    Raises:
        DynexportError: when the bundle cannot run on the backend; raised before a graph is loaded.
    """
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    check_backend(backend)
    check_threads(threads)
    check_weights(bundle, backend, weights)
    if profile is not None:
        profile = checked_path("profile", profile)
    if backend == "tensorrt" or backend == "tensorrt-rtx":
        from dynexport.runtime.engines.tensorrt.opening import TensorRtBackend

        return TensorRtBackend(bundle, backend)
    return OnnxRuntimeBackend(bundle, threads, profile, _PROVIDERS[backend], packed=weights == "packed")


def check_weights(bundle: Bundle, backend: RunBackend, weights: str) -> None:
    """Raise DynexportError for weights of an unknown kind, or that the bundle cannot have on the backend."""
    if weights not in WEIGHTS:
        raise DynexportError(f"weights: expected {', '.join(WEIGHTS)}, found {shown(weights)}")
    if weights == "packed":
        return
    if backend != "onnxruntime":
        raise DynexportError(f"weights: expected packed on {backend}, found {weights}; the CPU alone can map them")
    if bundle.manifest.precision != "fp32" or bundle.manifest.target != "onnxruntime":
        raise DynexportError(
            f"weights: expected packed for {bundle.path}, which is {bundle.manifest.precision} for "
            f"{bundle.manifest.target}, found {weights}; fp32 alone is fast enough without packing"
        )


def check_backend(backend: str) -> None:
    """Raise DynexportError for an unknown backend."""
    if backend not in RUN_BACKENDS:
        raise DynexportError(f"backend: expected {', '.join(RUN_BACKENDS)}, found {shown(backend)}")


def backend_text(backend: RunBackend) -> str:
    """Return a backend's name and version, and the GPU that it runs on, for reports.

    Raises:
        DynexportError: when it is not installed, or its name is unknown.
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


__all__ = ["RUN_BACKENDS", "WEIGHTS", "RunBackend", "Weights", "backend_text", "check_weights", "open_backend"]
