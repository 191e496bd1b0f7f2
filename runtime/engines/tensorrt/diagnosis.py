"""Check the installation of TensorRT: what is available, what is missing or inconsistent, and the fix."""

from __future__ import annotations

import re
from importlib import metadata

from pydantic import BaseModel

from dynexport.plugins import rtx
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.backend import BACKENDS, Backend, BackendName, module_of, open_backend
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu

_WHEEL = re.compile(r"_cu(\d+)(_libs|_bindings)?$")


class Finding(BaseModel):
    """The result of one check.

    Attributes:
        subject: the component that was checked.
        found: its version or state, or the problem and its fix.
        good: whether it works; false also for a missing backend or GPU, which is no fault but prevents running engines.
    """

    subject: str
    found: str
    good: bool


def diagnose() -> list[Finding]:
    """Return the checks of all that building and running engines needs, in the order to fix problems."""
    gpu = find_gpu()
    return [_gpu(gpu), *(finding for name in BACKENDS for finding in _backend(name, gpu)), _polygraphy()]


def _gpu(gpu: Gpu | NoGpu) -> Finding:
    if isinstance(gpu, NoGpu):
        return Finding(
            subject="GPU",
            found=f"none ({gpu.reason}): engines cannot run here; tensorrt-rtx can still build them",
            good=False,
        )
    return Finding(subject="GPU", found=str(gpu), good=True)


def _backend(name: BackendName, gpu: Gpu | NoGpu) -> list[Finding]:
    try:
        backend = open_backend(name)
    except DynexportError as error:
        return [Finding(subject=name, found=str(error), good=False)]
    where = f"builds for {', '.join(backend.capabilities)}" if backend.capabilities else "builds for the GPU here"
    found = [Finding(subject=name, found=f"{backend.version}, {where}", good=True)]
    faults = (_unlike_versions(backend), _old_driver(backend, gpu), _unnamed_library(backend))
    return [*found, *(Finding(subject=name, found=fault, good=False) for fault in faults if fault)]


def _unlike_versions(backend: Backend) -> str | None:
    """Return the problem of a wheel's part with another version: parts are packages, and may be updated separately."""
    for name, version in _wheels(backend.name).items():
        if version != backend.version:
            return (
                f"expected {name} {backend.version} as of its module, found {version}; "
                f"pip install --force-reinstall 'dynexport[{backend.name}]'"
            )
    return None


def _old_driver(backend: Backend, gpu: Gpu | NoGpu) -> str | None:
    majors = [int(match[1]) for name in _wheels(backend.name) if (match := _WHEEL.search(name))]
    if isinstance(gpu, Gpu) and majors and int(gpu.cuda.partition(".")[0]) < max(majors):
        return f"made for CUDA {max(majors)}, the driver supports {gpu.cuda}; update the driver"
    return None


def _unnamed_library(backend: Backend) -> str | None:
    if backend.name != "tensorrt-rtx":
        return None
    cure = rtx.cure_for_others()
    others = (
        f"its wheel has no {rtx.WANTED}, for which the ONNX parser looks when a graph has plugins: other tools abort "
        f"then (dynexport does not); fix: {cure}"
    )
    return rtx.problem() or (others if cure else None)


def _wheels(name: BackendName) -> dict[str, str]:
    """Return versions of a backend's packages with a CUDA version in the name, such as tensorrt_rtx_cu13_libs."""
    installed = {str(part.name).replace("-", "_"): part.version for part in metadata.distributions() if part.name}
    module = module_of(name)
    return {wheel: version for wheel, version in installed.items() if re.fullmatch(module + _WHEEL.pattern, wheel)}


def _polygraphy() -> Finding:
    try:
        found = metadata.version("polygraphy")
    except metadata.PackageNotFoundError:
        return Finding(
            subject="polygraphy", found="missing, needed to compare engines: pip install polygraphy", good=False
        )
    return Finding(subject="polygraphy", found=found, good=True)
