"""A graph of a bundle to an engine: taken from the bundle where the same one lies there, built where not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.engines.tensorrt.backend import Backend, BuildTarget
from dynexport.runtime.engines.tensorrt.check import check_target
from dynexport.runtime.engines.tensorrt.gpu import Gpu, NoGpu, find_gpu
from dynexport.runtime.engines.tensorrt.network import one_line
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.record import EngineRecord, GraphHashes, Recipe
from dynexport.runtime.engines.tensorrt.shapes import profile_shapes
from dynexport.runtime.engines.tensorrt.store import Stored, entry, find, part_file, put
from dynexport.runtime.engines.tensorrt.timing import timing_file
from dynexport.runtime.engines.tensorrt.worker import START, Job
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """An engine of a bundle.

    Attributes:
        stored: where it lies, and its record.
        cached: whether it lay there already.
        damaged: why the one that lay there could not be taken; None where it could, or none did.
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
    progress: Progress = lambda phase, done, steps: None,
) -> Built:
    """The engine of a graph, with one profile for each that the manifest names.

    Args:
        target: from ``choose_target``.
        plugins: to take for functions of the graph of the same name; without them a function's body is built. A graph
            without calls of our operators has none of them.
        strip: leave out the weights; they are taken from the bundle when the engine is opened.
        force: build although the same engine lies in the bundle.
        progress: told what is being done, and how many of how many steps of that are.

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
    with part_file(bundle, recipe) as part:
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
        result = _run(job, progress)
        record = EngineRecord(
            recipe=recipe,
            engine=entry(part),
            profiles=graph.profiles,
            cuda=gpu.cuda if isinstance(gpu, Gpu) else None,
            build_seconds=result["seconds"],
            peak_bytes=result["peak_bytes"],
        )
        return Built(put(bundle, record, part), cached=False, damaged=damaged)


def _run(job: Job, progress: Progress) -> dict[str, Any]:
    """The result of a worker."""
    # A folder of its own for what it leaves there when it is killed.
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory(prefix="dynexport-") as scratch:
        worker = subprocess.Popen(
            # -P: what lies in the working directory is nobody's module.
            [sys.executable, "-P", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "TMPDIR": scratch},
            start_new_session=True,  # an interrupt from the keyboard is ours, and we end it
        )
        last: dict[str, Any] = {}
        try:
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write(job.model_dump_json().encode())
            worker.stdin.close()
            for line in worker.stdout:
                last = json.loads(line)
                if "phase" in last:
                    progress(last["phase"], last["done"], last["steps"])
        finally:
            if "seconds" not in last:
                worker.kill()
            worker.wait()
        if "seconds" in last:
            return last
        errors.seek(0)
        reason = last.get("error") or _how_it_ended(worker.returncode, errors.read().decode(errors="replace"))
    raise DynexportError(f"{job.model}: {job.backend} cannot build an engine: {reason}")


def _how_it_ended(code: int, errors: str) -> str:
    last = one_line((errors.strip().splitlines() or [""])[-1])
    if code == -signal.SIGKILL:
        return "the builder was killed, most likely for want of memory; build on a machine that has more"
    ending = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return f"the builder ended {ending}{': ' if last else ''}{last}"
