"""Build engines in a separate process, so that an abort or memory leak of TensorRT does no harm."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dynexport.plugins.creators import allow_in_place
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import forget_peak_memory, peak_memory
from dynexport.runtime.engines.tensorrt.backend import BackendName, open_backend
from dynexport.runtime.engines.tensorrt.network import Log, add_profile, parse
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.shapes import ShapeRange
from dynexport.runtime.engines.tensorrt.timing import keep_timings, use_timings

START = "from dynexport.runtime.engines.tensorrt.worker import main; main()"


class Job(BaseModel):
    """One engine to build; a line of JSON on standard input.

    Attributes:
        backend: backend that builds.
        model: the ONNX file.
        output: path of the engine to write.
        profiles: minimum, optimum and maximum shape of each dynamic input, by name, for every profile.
        compute_capabilities: targets of a backend that can build for other GPUs; empty for a portable engine.
        plugins: plugins to load; None without plugins.
        timings: path of the timing cache; None for a backend that has none.
        stripped: whether to leave out the weights.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: BackendName
    model: Path
    output: Path
    profiles: list[dict[str, ShapeRange]]
    compute_capabilities: tuple[str, ...]
    plugins: PluginLibrary | None
    timings: Path | None
    stripped: bool


def main() -> None:
    """Build the jobs of standard input; write progress, and a result or an error per job, as lines of JSON."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what TensorRT prints must not come between our messages

    def say(fields: dict[str, Any]) -> bool:
        """Send a message; return whether the reader still exists."""
        try:
            channel.write(json.dumps(fields) + "\n")
        except OSError:
            return False
        return True

    for line in sys.stdin.buffer:
        start = time.monotonic()
        forget_peak_memory()
        try:
            _build(Job.model_validate_json(line), say)
        except DynexportError as error:
            say({"error": str(error)})
        else:
            say({"seconds": round(time.monotonic() - start, 3), "peak_bytes": peak_memory()})


def _build(job: Job, say: Callable[[dict[str, Any]], bool]) -> None:
    trt = open_backend(job.backend).trt
    log = Log(trt)
    if job.plugins is not None:
        job.plugins.load(trt)
    try:
        builder = trt.Builder(log.logger)
    except TypeError as error:  # the bindings raise it when there is no builder
        raise DynexportError(log.refusal()) from error
    network, parser = parse(trt, builder, log, job.model, plugins=job.plugins is not None)
    config = builder.create_builder_config()
    for shapes in job.profiles:
        add_profile(builder, config, network, shapes)
    _configure(trt, config, job, say)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DynexportError(log.refusal())
    del parser
    try:
        job.output.write_bytes(memoryview(engine))
    except OSError as error:
        raise DynexportError(f"cannot write the engine ({error.strerror})") from error
    if job.timings is not None:
        keep_timings(config, job.timings)


def _configure(trt: Any, config: Any, job: Job, say: Callable[[dict[str, Any]], bool]) -> None:
    # The engine inspector needs it to name layers.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, say)
    if job.plugins is not None:
        allow_in_place(trt, config)
    if job.stripped:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # The refit uses the same weights, so TensorRT may fold and fuse them as in an engine with weights.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if job.timings is not None:
        use_timings(config, job.timings)
    elif job.compute_capabilities:
        config.num_compute_capabilities = len(job.compute_capabilities)
        for index, capability in enumerate(job.compute_capabilities):
            name = "SM" + capability.replace(".", "")
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)


def _monitor(trt: Any, say: Callable[[dict[str, Any]], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of a module that is chosen at run time
        """Reports the steps of the current phase; a share of the whole would mislead, since steps differ in length."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._steps[name] = steps
            self.step_complete(name, -1)

        def step_complete(self, name: str, step: int) -> bool:
            # False ends the build, when the reader no longer exists.
            return say({"phase": name, "done": step + 1, "steps": self._steps.get(name, 0)})

        def phase_finish(self, name: str) -> None:
            pass

    return Monitor()
