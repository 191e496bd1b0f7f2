"""The driver of every bundle: check a batch, split it into calls, run them, commit their cache entries."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import (
    checked_count,
    checked_decisions,
    checked_ids,
    checked_kind,
    checked_list,
    checked_rows,
)
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.bundle.manifest import Depth, Graph, Phase, Program
from dynexport.runtime.engines.engine import Backend, Engine
from dynexport.runtime.engines.registry import RunBackend, Weights, open_backend
from dynexport.runtime.execution.batch import CHUNK, Batch, Call, CallResult, EvenChunks, StepResult, Tokens, Wanted
from dynexport.runtime.execution.calls import Cutter, Part, call_of
from dynexport.runtime.execution.checking import by_depth, checked_for_rows, checked_parts, is_plain
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.graph_set import RunningSet
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.plain_step import PlainStep, PlainSteps
from dynexport.runtime.execution.whole_step import WholeStep

Array = np.ndarray


class Running(Protocol):
    """A program whose graphs are loaded.

    Attributes:
        graph: the graph whose sizes limit a call.
    """

    @property
    def graph(self) -> Graph: ...

    def run(self, cache: KvCache, call: Call) -> CallResult:
        """Run one call on its rows' caches; the caller commits the entries that it wrote."""


class Executor:
    """A bundle's programs, each loaded at its first use.

    Several threads may share an executor if each uses its own caches.

    Args:
        bundle: an opened bundle.
        threads: intra-op threads of ONNX Runtime; None lets it take one per physical core.
        backend: the backend that runs the graphs.
        profile: prefix of the files that ONNX Runtime's profiler writes, or None to run without it.
        weights: as for ``open_backend``.
        wrap: receives the backend and returns the one to use instead, for tools that inspect graphs.

    Attributes:
        limits: the bundle's limits for a call.

    Raises:
        DynexportError: when the bundle cannot run on this backend or machine; raised before any graph is loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        backend: RunBackend = "onnxruntime",
        profile: Path | None = None,
        weights: Weights = "packed",
        wrap: Callable[[Backend], Backend] = lambda backend: backend,
    ) -> None:
        self._backend = wrap(open_backend(bundle, backend, threads, profile=profile, weights=weights))
        self.bundle, self.manifest = bundle, bundle.manifest
        self.backend, self.threads, self.weights = backend, threads, weights
        self.limits, self.layout = bundle.manifest.limits, CacheLayout(bundle.manifest)
        self.reader = DecisionReader(bundle.manifest)
        self._engines: dict[str, Engine] = {}
        self._programs: dict[tuple[Phase, str], Running] = {}
        self._masks: dict[tuple[int, ...], Array] = {}
        self._plain: dict[int, tuple[Array, Array, Array]] = {}
        self._steps = PlainSteps()
        self._opening = threading.RLock()
        self._walking = threading.Lock()  # one for all graph sets: prefill and decode share engines

    def cache(self, rows: int, tokens: int, *, record: bool = False, room: int | None = None) -> KvCache:
        """Make a cache whose rows are all free.

        Args:
            rows: number of rows.
            tokens: capacity of a row in tokens; the model's context is the upper limit.
            record: true keeps every row's decisions.
            room: tokens per row to allocate memory for now; buffers grow later. None allocates for all.
        """
        return KvCache(
            self.manifest,
            self.layout,
            self._backend,
            rows,
            tokens,
            counters=self.reader.overflows,
            record=record,
            room=room,
        )

    def full_cache(self, rows: int, tokens: int, *, record: bool = False, room: int | None = None) -> KvCache:
        """Make a cache whose rows are all acquired, for ``prefill`` and ``step``; arguments as for ``cache``."""
        cache = self.cache(rows, tokens, record=record, room=room)
        cache.acquire(rows)
        return cache

    def check_cache(self, cache: KvCache) -> None:
        """Raise DynexportError for a cache that was made for another model."""
        checked_kind("cache", cache, KvCache, "one of Executor.cache")
        if cache.manifest is self.manifest:
            return
        if cache.manifest.model != self.manifest.model or cache.manifest.caches != self.manifest.caches:
            raise DynexportError("cache: expected one of Executor.cache, found one of another model")

    def run(self, cache: KvCache, batch: Batch) -> StepResult:
        """Run a batch on its rows' caches.

        A decode step of all rows is one call. A longer prompt runs in chunks of at most ``batch.chunk`` tokens; a
        prompt that top-k routes runs as a whole. When a call fails, the caches are as before the batch.

        Raises:
            DynexportError: for a row that is free or given twice, an invalid token id, tokens that do not fit, a depth
                that the bundle does not have, decisions that no router can make, a cache in use by another thread, or
                a route that the contract defines as an error.
        """
        self.check_cache(cache)
        checked_kind("batch", batch, Batch, "a Batch")
        with cache.running:
            parts = checked_parts(cache, batch, self.reader, self.bundle.path)
            rows = [part.row for part in parts]
            cache.reserve(max((int(cache.positions[part.row]) + len(part.ids) for part in parts), default=0))
            before = cache.lengths[:, rows]
            with cache.as_it_was_on_error(rows):
                for depth, group in by_depth(parts, batch):
                    self._run_at(cache, group, depth, batch)
            nothing = np.zeros((0, self.manifest.model.vocab_size), np.float32)
            decided = [self.reader.joined(part.decisions) for part in parts] if self.reader.rows else None
            return StepResult(
                [_joined(part.logits, nothing) for part in parts], cache.lengths[:, rows] - before, decided
            )

    def decode(
        self,
        cache: KvCache,
        rows: Sequence[int],
        tokens: Sequence[int],
        depths: Sequence[Depth],
        *,
        lasting: bool = True,
    ) -> Array:
        """Run a decode step: feed one generated token to each of some rows.

        The result is that of ``run``. Adjacent rows at one depth take a faster way.

        Args:
            cache: a cache of this model.
            rows: numbers of acquired rows, each at most once.
            tokens: one token id per row.
            depths: one depth per row.
            lasting: true returns an array of its own; false may return memory that the cache's next run overwrites.

        Returns:
            Logits, float32 [rows, vocab].

        Raises:
            DynexportError: as for ``run``, and for no rows.
        """
        self.check_cache(cache)
        rows, tokens = checked_list("rows", rows, "rows"), checked_list("tokens", tokens, "token ids")
        if not rows:
            raise DynexportError("rows: expected at least one, found none")
        first, count = rows[0], len(rows)
        if not is_plain(rows, tokens, depths):
            each = [[token] for token in tokens]
            return np.concatenate(self.run(cache, Batch(rows, each, "decode", depths)).logits)
        with cache.running:
            cache.check_step(first, count)
            ids = checked_ids("tokens", tokens, self.manifest.model.vocab_size)
            cache.reserve(max(cache.positions[first : first + count].tolist()) + 1)
            if not lasting and not self.reader.rows:

                def bound() -> PlainStep | None:
                    return PlainStep.bound(*self._plain_call(first, count, ids[:, None], depths[0], lasting), cache)

                if (step := self._steps.get(cache, (first, count, depths[0].name), bound)) is not None:
                    return step.run(cache, ids)
            running, call = self._plain_call(first, count, ids[:, None], depths[0], lasting)
            # An interrupt between the counts of two rows must restore the first one's.
            counted = self.reader.rows or cache.logs is not None
            with cache.as_it_was_on_error(rows) if counted else nullcontext():
                result = running.run(cache, call)
                cache.commit(call.rows, call.counts, result.entries, result.decisions)
            return result.logits[:, 0]

    def _plain_call(self, first: int, count: int, ids: Array, depth: Depth, lasting: bool) -> tuple[Running, Call]:
        """Return the program and the call of a decode step of adjacent rows; constant inputs are cached."""
        if count not in self._plain:
            wanted, forced = np.zeros((count, 1), np.int64), np.full((self.reader.rows, count, 1), -1, np.int64)
            self._plain[count] = np.ones(count, np.int64), wanted, forced
        counts, wanted, forced = self._plain[count]
        active = self._mask("decode", depth)
        lasting = lasting or bool(self.reader.rows)  # recorded decisions must stay valid
        call = Call(slice(first, first + count), ids, counts, active, wanted, forced, False, lasting)
        return self.program("decode", depth), call

    def prefill(
        self,
        cache: KvCache,
        prompts: Sequence[Tokens],
        *,
        depth: Depth | None = None,
        chunk: int | EvenChunks = CHUNK,
        all_logits: bool = False,
        logits_at: Sequence[Array] | None = None,
        forced: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Run one prompt per row of a cache, after the tokens that it holds: ``run`` for all rows at once.

        Args:
            cache: a cache whose rows are all acquired.
            prompts: token ids, int64 [n] per row.
            depth: the depth of all rows; None for full depth.
            chunk: the largest number of a row's tokens in one call.
            all_logits: true returns the logits of every token.
            logits_at: int64 [K] per row, ascending indices into its prompt; returns the logits of these tokens only.
            forced: as for ``Batch``.

        Returns:
            Per row float32 [1, vocab], the logits of its last token; or [len, vocab] with ``all_logits``; or [K, vocab]
            with ``logits_at``.

        Raises:
            DynexportError: as for ``run``.
        """
        self.check_cache(cache)
        rows = checked_for_rows("prompts", prompts, cache.rows)
        wanted: Wanted = logits_at if logits_at is not None else "all" if all_logits else "last"
        depth = self.manifest.full if depth is None else depth
        return self.run(cache, Batch(range(cache.rows), rows, "prompt", depth, wanted, forced, chunk)).logits

    def step(
        self, cache: KvCache, tokens: Tokens, depth: Depth, live: Array | None = None, *, forced: Array | None = None
    ) -> Array:
        """Run a decode step of all rows of a cache: feed one generated token to each.

        Args:
            cache: a cache whose rows are all acquired.
            tokens: int64 [rows].
            depth: the depth of all rows.
            live: bool [rows], false for rows that have ended and do not run. None runs all.
            forced: int64 [R, rows], forced decisions; -1 leaves one to its router.

        Returns:
            Logits, float32 [rows, vocab]; zeros for rows that have ended.

        Raises:
            DynexportError: as for ``run``.
        """
        self.check_cache(cache)
        ids = checked_ids("tokens", tokens, self.manifest.model.vocab_size)
        if len(ids) != cache.rows:
            raise DynexportError(f"tokens: expected {cache.rows}, one for each row of the cache, found {len(ids)}")
        rows = np.arange(cache.rows) if live is None else np.flatnonzero(checked_rows("live", live, cache.rows))
        told = None
        if forced is not None:
            wish = checked_decisions("forced", forced, (self.reader.rows, cache.rows)) if self.reader.rows else forced
            told = [wish[:, row : row + 1] for row in rows]
        found = self.run(cache, Batch(rows.tolist(), list(ids[rows, None]), "decode", depth, "last", told)).logits
        if live is None:
            return found[0] if len(found) == 1 else np.concatenate(found)
        logits = np.zeros((cache.rows, self.manifest.model.vocab_size), np.float32)
        for row, values in zip(rows, found, strict=True):
            logits[row] = values[0]
        return logits

    def program(self, phase: Phase, depth: Depth) -> Running:
        """Return the loaded program of a phase and depth. Raises DynexportError for an unknown depth."""
        key = phase, depth.name
        if key not in self._programs:
            checked_kind("depth", depth, Depth, "one of Bundle.depth")
            with self._opening:
                self._programs[key] = self._opened(self.manifest.program(phase, depth))
        return self._programs[key]

    def load(self, depth: Depth) -> None:
        """Load the graphs of a depth now rather than at their first use."""
        self.program("prompt", depth)
        self.program("decode", depth)

    def end_profiling(self) -> list[Path]:
        """Write the profiler's file of every loaded graph and return the paths."""
        files = {engine.graph.file: engine for engine in self._engines.values()}  # parts of a file share a session
        return [engine.end_profiling() for engine in files.values()]

    def _opened(self, program: Program) -> Running:
        engines = {name: self._engine(self.manifest.graph(name)) for name in program.names}
        if program.set is not None:
            return RunningSet(self.manifest, program.set, engines, self._walking)
        return WholeStep(self.manifest, *engines.values())

    def _engine(self, graph: Graph) -> Engine:
        if graph.name not in self._engines:
            with self.bundle.unchanged():
                self._engines[graph.name] = self._backend.open(graph)
        return self._engines[graph.name]

    def _run_at(self, cache: KvCache, parts: list[Part], depth: Depth, batch: Batch) -> None:
        """Run rows at one depth, call by call."""
        running, active = self.program(batch.phase, depth), self._mask(batch.phase, depth)
        for pieces in Cutter(cache, self.limits, running.graph, batch.chunk).pieces(parts):
            call = call_of(pieces, active, is_prompt=batch.phase == "prompt")
            result = running.run(cache, call)
            cache.commit(call.rows, call.counts, result.entries, result.decisions)
            for piece in pieces:
                row = piece.part.row - call.rows.start
                piece.part.logits.append(result.logits[row, : len(piece.wanted)])
                if result.decisions is not None:
                    piece.part.decisions.append(result.decisions[row])
                piece.part.done += piece.count

    def _mask(self, phase: Phase, depth: Depth) -> Array:
        """Return the mask of the layers that run in a phase, bool [layers]; cached per set of layers."""
        layers = depth.prompt if phase == "prompt" else depth.keep
        if layers not in self._masks:
            for layer in layers:
                checked_count("depth: a kept layer", layer, 0, self.manifest.model.layers - 1)
            self._masks[layers] = np.isin(np.arange(self.manifest.model.layers), layers)
        return self._masks[layers]


def _joined(pieces: list[Array], nothing: Array) -> Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate([nothing, *pieces])


__all__ = ["Executor", "Running"]
