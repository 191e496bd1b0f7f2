"""The process that builds engines, one after the other; starting it takes longer than building a small engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt.network import one_line
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary
from dynexport.runtime.engines.tensorrt.worker import START, Job

Progress = Callable[[str, int, int], None]


class Builder:
    """A context manager that runs build jobs in a process, started at the first job and again after a failure."""

    def __init__(self) -> None:
        self._worker: _Worker | None = None

    def __enter__(self) -> Builder:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, job: Job, progress: Progress) -> dict[str, Any]:
        """Build an engine; return ``seconds`` (build time) and ``peak_bytes`` (peak memory) by name.

        Args:
            job: the engine to build.
            progress: callback with the name of a build phase, its finished steps and its number of steps.

        Raises:
            DynexportError: when TensorRT cannot build the engine, or the process ends.
        """
        if self._worker is None or self._worker.plugins != job.plugins:  # a process cannot unload plugins
            self._end()
            self._worker = _Worker(job.plugins)
        result: dict[str, Any] = {}
        try:
            result = self._worker.build(job, progress)
        finally:
            if "seconds" not in result:
                self._end()
        if "seconds" in result:
            return result
        raise DynexportError(f"{job.model}: {job.backend} cannot build an engine: {result['error']}")

    def _end(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None


class _Worker:
    """A process that runs ``worker.main``, for jobs with the same plugins."""

    def __init__(self, plugins: PluginLibrary | None) -> None:
        self.plugins = plugins
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``end``
        # Its own directory for temporary files, which remain there if it is killed.
        self._scratch = tempfile.TemporaryDirectory(prefix="dynexport-")
        self._process = subprocess.Popen(
            # -P: do not import modules from the working directory.
            [sys.executable, "-P", "-c", START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, "TMPDIR": self._scratch.name},
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends the worker
        )

    def build(self, job: Job, progress: Progress) -> dict[str, Any]:
        """Run a job; return its result, or an ``error``: the worker's message, or the way the worker ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(job.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "phase" not in message:
                return message
            progress(message["phase"], message["done"], message["steps"])
        return self._ended()

    def end(self) -> None:
        """Kill the process and remove its temporary files."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._scratch.cleanup()

    def _ended(self) -> dict[str, Any]:
        code = self._process.wait()
        self._errors.seek(0)
        last = one_line((self._errors.read().decode(errors="replace").strip().splitlines() or [""])[-1])
        if code == -signal.SIGKILL:
            return {"error": "the builder was killed, most likely out of memory; build on a machine with more memory"}
        ending = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return {"error": f"the builder ended {ending}{': ' if last else ''}{last}"}


__all__ = ["Builder", "Progress"]
