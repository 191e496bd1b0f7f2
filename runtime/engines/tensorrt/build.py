"""Build the engine of a graph; an up-to-date engine in the bundle is reused."""

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
    """The result of ``build_engine``.

    Attributes:
        stored: the engine's path and record.
        cached: whether an existing engine was reused.
        damaged: the reason that an existing engine was not reused: damaged or not trusted; None if it was, or there was
            none.
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
    """Return the recipe of a graph's engine: all inputs that decide it.

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
    """Build a graph's engine with the manifest's profiles, or reuse an up-to-date one, and return it.

    Args:
        bundle: the bundle that holds the graph and will hold the engine.
        graph: the graph's entry in the manifest.
        backend: the backend that builds.
        target: the result of ``choose_target``.
        plugins: plugins that replace the graph's functions of the same name; None builds the functions' bodies. They
            are not used for a graph that does not call dynexport's custom operators.
        strip: whether to leave out the weights; opening the engine then takes them from the bundle.
        force: whether to build even if the bundle has an up-to-date engine.
        builder: a process shared by several builds; None starts one for this engine.
        progress: callback, as for ``Builder.run``.

    Raises:
        DynexportError: when TensorRT cannot build the graph, with the node or the reason; or when ``strip`` is set and
            there is no GPU.
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
