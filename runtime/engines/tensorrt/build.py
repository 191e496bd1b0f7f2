"""A graph of a bundle to an engine: taken from the bundle where the same one lies there, built where not."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import File, Graph
from dynexport.runtime.engines.tensorrt.backend import Backend, BuildTarget
from dynexport.runtime.engines.tensorrt.builder import Builder, Progress
from dynexport.runtime.engines.tensorrt.check import check_target
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.record import EngineRecord, GraphHashes, Recipe
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes
from dynexport.runtime.engines.tensorrt.store import Stored, find, place_for_engine, put
from dynexport.runtime.engines.tensorrt.timing import timing_file
from dynexport.runtime.engines.tensorrt.worker import Job


@dataclass(frozen=True)
class Built:
    """An engine of a bundle.

    Attributes:
        stored: where it lies, and its record.
        cached: whether it lay there already.
        damaged: why the one that lay there could not be taken, or is not trusted; None where it could, or none did.
    """

    stored: Stored
    cached: bool
    damaged: str | None = None


def recipe_of(
    bundle: Bundle,
    graph: Graph,
    backend: Backend,
    target: BuildTarget,
    plugins: PluginLibrary | None = None,
    *,
    strip: bool = False,
) -> Recipe:
    """All that decides the engine of a graph.

    Raises:
        DynexportError: when the bundle's graphs are not written for TensorRT.
    """
    check_target(bundle)
    return Recipe(
        graph=GraphHashes.of(bundle.manifest, graph),
        backend=backend.name,
        backend_version=backend.version,
        compute_capabilities=target.compute_capabilities,
        gpu=target.gpu,
        plugins_sha256=plugins.sha256 if plugins else None,
        stripped=strip,
    )


def build_engine(
    bundle: Bundle,
    graph: Graph,
    backend: Backend,
    target: BuildTarget,
    *,
    plugins: PluginLibrary | None = None,
    strip: bool = False,
    force: bool = False,
    builder: Builder | None = None,
    progress: Progress = lambda phase, done, steps: None,
) -> Built:
    """The engine of a graph, with one profile for each that the manifest names.

    Args:
        target: from ``choose_target``.
        plugins: to take for functions of the graph of the same name; without them a function's body is built. A graph
            without calls of our operators has none of them.
        strip: leave out the weights; they are taken from the bundle when the engine is opened.
        force: build although the same engine lies in the bundle.
        builder: builds several engines in one process; None for one of this engine's own.
        progress: as for ``Builder.run``.

    Raises:
        DynexportError: when TensorRT cannot build the graph; it names the node or the reason. Without a GPU it cannot
            leave out weights.
    """
    if plugins is not None and not plugins.serve(bundle.path / graph.file):
        plugins = None
    recipe = recipe_of(bundle, graph, backend, target, plugins, strip=strip)
    shapes = profile_shapes(graph)
    damaged = None
    try:
        stored = None if force else find(bundle, recipe)
    except DynexportError as error:
        stored, damaged = None, str(error)
    if stored is not None:
        return Built(stored, cached=True)
    gpu = find_gpu()
    if strip and isinstance(gpu, NoGpu):
        raise DynexportError(
            f"--strip: {backend.name} leaves out weights on a GPU only, found none ({gpu.reason}); build on a machine "
            "with one, or without --strip"
        )
    model = bundle.path / graph.file
    with place_for_engine(bundle) as part:
        job = Job(
            backend=backend.name,
            model=model,
            output=part,
            profiles=shapes,
            compute_capabilities=target.compute_capabilities,
            plugins=plugins,
            timings=timing_file(backend.version, target.gpu) if target.gpu else None,
            stripped=strip,
        )
        with bundle.unchanged(), nullcontext(builder) if builder else Builder() as process:
            result = process.run(job, progress)
        record = EngineRecord(
            recipe=recipe,
            engine=File.of(part),
            profiles=graph.profiles,
            cuda=gpu.cuda if isinstance(gpu, Gpu) else None,
            build_seconds=result["seconds"],
            peak_bytes=result["peak_bytes"],
        )
        return Built(put(bundle, record, part), cached=False, damaged=damaged)
