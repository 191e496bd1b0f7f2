"""What every decoder begins with: a bundle, and the engines of its graphs."""

from __future__ import annotations

from pathlib import Path

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.engines.engine import Engine
from dynexport.runtime.engines.opening import Opener, RunBackend, engine_opener
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import Graph


class Loaded:
    """A bundle's graphs, each loaded when it is first needed.

    Args:
        backend: what runs the graphs; other arguments and errors as for ``engine_opener``.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        backend: RunBackend = "onnxruntime",
        profile: Path | None = None,
        alone: bool = True,
    ) -> None:
        self._open: Opener = engine_opener(bundle, backend, threads, profile=profile, alone=alone)
        self.bundle, self.manifest = bundle, bundle.manifest
        self.backend, self.threads = backend, threads
        self._engines: dict[str, Engine] = {}
        self._begin()

    def _begin(self) -> None:
        """What a kind of decoder prepares, and makes sure of."""

    def _engine(self, graph: Graph) -> Engine:
        if graph.name not in self._engines:
            with self.bundle.unchanged():
                self._engines[graph.name] = self._open(graph)
        return self._engines[graph.name]

    def _check_outputs(self, graph: Graph, *wanted: str) -> None:
        """Raise DynexportError for a graph that lacks an output."""
        if missing := set(wanted) - {spec.name for spec in graph.outputs}:
            raise DynexportError(
                f"{self.bundle.path}: {graph.file}: expected an output {min(missing)}, found none; convert again"
            )

    def end_profiling(self) -> list[Path]:
        """The profiles of the graphs that were loaded."""
        return [engine.end_profiling() for engine in self._engines.values()]


__all__ = ["Loaded"]
