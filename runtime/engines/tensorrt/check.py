"""Check by its record that an engine belongs to a bundle and can run here, before TensorRT reads it."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.tensorrt.backend import BackendName
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu
from dynexport.runtime.engines.tensorrt.record import EngineRecord, GraphHashes
from dynexport.runtime.engines.tensorrt.store import Stored, stored_engines

_LEAST_PORTABLE = (8, 0)


@dataclass(frozen=True)
class Here:
    """The environment that an engine would run in.

    Attributes:
        versions: versions of the installed backends.
        gpu: the GPU, or the reason that there is none.
        plugins_sha256: hash of the plugins that can be loaded; None without plugins.
        backend: backend that is to run the engine; None for the one that built it.
    """

    versions: dict[BackendName, str]
    gpu: Gpu | NoGpu
    plugins_sha256: str | None = None
    backend: BackendName | None = None


def check_target(bundle: Bundle) -> None:
    """Raise DynexportError when a bundle's graphs are not written for TensorRT."""
    target = bundle.manifest.target
    if target != "tensorrt":
        raise DynexportError(
            f"{bundle.path}: expected a bundle for tensorrt, found one for {target}; make one with: "
            "dynexport convert --target tensorrt"
        )


def difference(record: EngineRecord, here: Here) -> str | None:
    """Return the first reason that an engine cannot run here, with both values; None if it can."""
    recipe = record.recipe
    if here.backend not in (None, recipe.backend):
        return f"built by {recipe.backend}, to be run by {here.backend}"
    version = here.versions.get(recipe.backend)
    if version is None:
        install = f"pip install 'dynexport[{recipe.backend}]'"
        return f"built by {recipe.backend} {recipe.backend_version}, here is none: {install}"
    if version != recipe.backend_version:
        return f"built by {recipe.backend} {recipe.backend_version}, here is {version}"
    if recipe.plugins_sha256 not in (None, here.plugins_sha256):
        return f"built with {_plugins(recipe.plugins_sha256)}, here are {_plugins(here.plugins_sha256)}"
    return _gpu_difference(record, here.gpu)


def check_record(record: EngineRecord, here: Here) -> None:
    """Raise DynexportError, with expected and found values, when an engine cannot run here."""
    found = difference(record, here)
    if found is not None:
        raise DynexportError(
            f"engine {record.recipe.key} of graph {record.recipe.graph.name}: {found}; run it where both agree, or "
            "build another with: dynexport build"
        )


def engine_for(bundle: Bundle, graph: Graph, here: Here) -> Stored:
    """Return an engine of a graph that can run here, preferably one with weights; its content is not yet checked.

    Raises:
        DynexportError: when no engine can run here; it gives the reason for the first engine found.
    """
    found = [item for item in stored_engines(bundle) if not isinstance(item, DynexportError)]
    found.sort(key=lambda item: item.record.recipe.stripped)
    reasons = []
    for stored in found:
        if stored.record.recipe.graph.name == graph.name:
            reason = mismatch(bundle, stored.record, here)
            if reason is None:
                return stored
            reasons.append(reason)
    why = f"{len(reasons)} that cannot run here ({reasons[0]})" if reasons else "none"
    raise DynexportError(
        f"{bundle.path}: graph {graph.name}: expected an engine, found {why}; build one with: "
        f"dynexport build {bundle.path}"
    )


def mismatch(bundle: Bundle, record: EngineRecord, here: Here) -> str | None:
    """Return the first reason that an engine does not fit the bundle's files or cannot run here; None if it does."""
    recipe = record.recipe.graph
    for graph in bundle.manifest.graphs:
        if graph.name == recipe.name:
            now = GraphHashes.of(bundle.manifest, graph)
            for field, what in (("graph", graph.file), ("weights", "weights"), ("interface", "shapes or profiles")):
                then, current = getattr(recipe, f"{field}_sha256"), getattr(now, f"{field}_sha256")
                if then != current:
                    return f"built from {what} {then[:12]}.., the bundle has {current[:12]}.."
            return difference(record, here)
    return f"built from graph {recipe.name}, which the bundle does not have"


def _gpu_difference(record: EngineRecord, gpu: Gpu | NoGpu) -> str | None:
    wanted = record.recipe.compute_capabilities
    built_for = f"compute capability {', '.join(wanted)}" if wanted else "compute capability 8.0 and newer"
    if isinstance(gpu, NoGpu):
        return f"built for {built_for}, here is no GPU ({gpu.reason})"
    capability = tuple(int(part) for part in gpu.compute_capability.split("."))
    if gpu.compute_capability not in wanted if wanted else capability < _LEAST_PORTABLE:
        return f"built for {built_for}, here is {gpu.compute_capability} ({gpu.name})"
    if record.recipe.gpu not in (None, gpu.name):
        return f"built for {record.recipe.gpu}, here is {gpu.name}"
    return None


def _plugins(sha256: str | None) -> str:
    return f"plugins {sha256[:12]}.." if sha256 else "no plugins"
