"""What every decoder begins with: a bundle, and the engines of its graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ClassVar, Concatenate, ParamSpec, TypeVar

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_kind
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Graph
from dynexport.runtime.engines.engine import Engine
from dynexport.runtime.engines.registry import Opener, RunBackend, engine_opener
from dynexport.runtime.execution.cache import Entries

P = ParamSpec("P")
R = TypeVar("R")


class Loaded:
    """A bundle's graphs, each loaded when it is first needed; several threads may use them, each with its own caches.

    Args:
        backend: what runs the graphs; other arguments and errors as for ``engine_opener``.
    """

    _cache_kind: ClassVar[type[Entries]]

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        backend: RunBackend = "onnxruntime",
        profile: Path | None = None,
    ) -> None:
        self._open: Opener = engine_opener(bundle, backend, threads, profile=profile)
        self.bundle, self.manifest = bundle, bundle.manifest
        self.backend, self.threads = backend, threads
        self._engines: dict[str, Engine] = {}
        self._opening = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        """What a kind of decoder prepares, and makes sure of."""

    def check_cache(self, cache: Entries) -> None:
        """Raise DynexportError for a cache that is not one of the decoder's own."""
        expected = "one of the decoder's own cache()"
        checked_kind("cache", cache, self._cache_kind, expected)
        if cache.model != self.manifest.model:
            raise DynexportError(f"cache: expected {expected}, found one of another model")

    def _first_room(self, room: int | None) -> int | None:
        """Tokens that a cache has room for at first: all on a GPU, where what it holds cannot move."""
        return room if self.backend == "onnxruntime" else None

    def _engine(self, graph: Graph) -> Engine:
        if graph.name not in self._engines:
            with self._opening, self.bundle.unchanged():
                if graph.name not in self._engines:  # another thread may just have opened it
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


AnyLoaded = TypeVar("AnyLoaded", bound=Loaded)
AnyEntries = TypeVar("AnyEntries", bound=Entries)


def uses_cache(
    run: Callable[Concatenate[AnyLoaded, AnyEntries, P], R],
) -> Callable[Concatenate[AnyLoaded, AnyEntries, P], R]:
    """Let a prompt or step have its cache to itself; a cache of another kind, or one that is in use, is refused."""

    @wraps(run)
    def checked(self: AnyLoaded, cache: AnyEntries, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.check_cache(cache)
        with cache.running:
            return run(self, cache, *args, **kwargs)

    return checked


__all__ = ["Loaded", "uses_cache"]
