"""TensorRT and TensorRT-RTX behind one interface: module, version and supported build targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from dynexport.plugins import rtx
from dynexport.runtime.bundle.errors import DynexportError, require_module
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu

BackendName = Literal["tensorrt", "tensorrt-rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True)
class Backend:
    """TensorRT or TensorRT-RTX, imported.

    Attributes:
        name: name on the command line, and of the extra that installs it.
        trt: its Python module; dynexport uses only functions that both modules have.
        version: full version of the library; an engine works with exactly one version.
        capabilities: compute capabilities, such as "8.0", that it can build for without such a GPU, ascending; empty
            if it builds only for the GPU in the machine.
    """

    name: BackendName
    trt: Any
    version: str
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class BuildTarget:
    """The GPUs that an engine is built for.

    Attributes:
        compute_capabilities: compute capabilities, ascending; empty for a portable engine, which runs from 8.0 on.
        gpu: name of the only GPU model that can run it; None if the compute capability decides.
    """

    compute_capabilities: tuple[str, ...]
    gpu: str | None = None

    def __str__(self) -> str:
        return self.gpu or ", ".join(self.compute_capabilities) or "any GPU from 8.0 on"


def module_of(name: BackendName) -> str:
    """Return the name of a backend's Python module."""
    return name.replace("-", "_")


def open_backend(name: BackendName) -> Backend:
    """Import and return a backend, ready for plugins.

    Raises:
        DynexportError: when it is not installed or cannot be loaded.
    """
    try:
        trt: Any = rtx.load() if name == "tensorrt-rtx" else require_module(name, name, "build and run engines")
        version = str(trt.__version__)
    except DynexportError:
        raise
    except Exception as error:  # its __init__ loads libraries and may raise anything
        raise DynexportError(
            f"{module_of(name)}: installed, but cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    return Backend(name, trt, version, _capabilities(trt))


def choose_target(backend: Backend, wanted: tuple[str, ...] | None, gpu: Gpu | NoGpu) -> BuildTarget:
    """Return the target to build for.

    Args:
        backend: the backend that builds.
        wanted: requested compute capabilities; None for the GPU in this machine, or a portable engine without a GPU.
        gpu: the GPU in this machine, or the reason that there is none.

    Raises:
        DynexportError: when the backend cannot build for it; it names the targets that it can build for.
    """
    if not backend.capabilities:
        if isinstance(gpu, NoGpu):
            raise DynexportError(
                f"--backend {backend.name}: expected a GPU, found none ({gpu.reason}); it builds on the machine that "
                "runs the engine, --backend tensorrt-rtx on any"
            )
        if wanted not in (None, (gpu.compute_capability,)):
            raise DynexportError(
                f"--compute-capability: {backend.name} builds for the GPU here, expected {gpu.compute_capability}, "
                f"found {', '.join(wanted or ())}; build on that GPU, or with --backend tensorrt-rtx"
            )
        return BuildTarget((gpu.compute_capability,), gpu.name)
    if wanted is None:
        here = gpu.compute_capability if isinstance(gpu, Gpu) else None
        return BuildTarget((here,) if here in backend.capabilities else ())
    for capability in wanted:
        if capability not in backend.capabilities:
            raise DynexportError(
                f"--compute-capability: {backend.name} {backend.version} builds for {', '.join(backend.capabilities)}; "
                f"found {capability:.20}"
            )
    return BuildTarget(tuple(sorted(set(wanted), key=_numbers)))


def _capabilities(trt: Any) -> tuple[str, ...]:
    names = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    digits = [name.removeprefix("SM") for name in names if name.startswith("SM")]
    return tuple(sorted((f"{text[:-1]}.{text[-1]}" for text in digits), key=_numbers))


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))
