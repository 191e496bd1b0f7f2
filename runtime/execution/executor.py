"""The driver of every bundle: check a batch, cut it into calls, run them, commit what they wrote."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import (
    checked_count,
    checked_decisions,
    checked_ids,
    checked_kind,
    checked_list,
    checked_rows,
    is_integer,
)
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.layout import CacheLayout
from dynexport.runtime.bundle.manifest import Depth, Graph, Phase, Program
from dynexport.runtime.engines.engine import Backend, Engine
from dynexport.runtime.engines.registry import RunBackend, open_backend
from dynexport.runtime.execution.batch import CHUNK, Batch, Call, CallResult, StepResult, Tokens, Wanted
from dynexport.runtime.execution.calls import Cutter, Part, call_of
from dynexport.runtime.execution.checking import by_depth, checked_for_rows, checked_parts
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.graph_set import RunningSet
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.execution.plain_step import PlainStep, PlainSteps
from dynexport.runtime.execution.whole_step import WholeStep

Array = np.ndarray


class Running(Protocol):
    """A program whose graphs are loaded.

    Attributes:
        graph: whose sizes limit a call.
    """

    @property
    def graph(self) -> Graph: ...

    def run(self, cache: KvCache, call: Call) -> CallResult:
        """Run one call over its rows' caches; what it writes is not counted yet."""


class Executor:
    """A bundle's programs, each loaded when it is first needed.

    Several threads may use one, each with caches of its own.

    Args:
        bundle: an opened bundle.
        threads: intra-op threads of ONNX Runtime; None lets it take one per physical core.
        backend: what runs the graphs.
        profile: prefix of the files that ONNX Runtime's profiler writes, or None to run without it.
        wrap: what the backend is replaced by, given the backend: for those who look into graphs.

    Attributes:
        limits: what a call may have.

    Raises:
        DynexportError: when this bundle cannot run there; told before anything of it is loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        *,
        backend: RunBackend = "onnxruntime",
        profile: Path | None = None,
        wrap: Callable[[Backend], Backend] = lambda backend: backend,
    ) -> None:
        self._backend = wrap(open_backend(bundle, backend, threads, profile=profile))
        self.bundle, self.manifest = bundle, bundle.manifest
        self.backend, self.threads = backend, threads
        self.limits, self.layout = bundle.manifest.limits, CacheLayout(bundle.manifest)
        self.reader = DecisionReader(bundle.manifest)
        self._engines: dict[str, Engine] = {}
        self._programs: dict[tuple[Phase, str], Running] = {}
        self._masks: dict[tuple[int, ...], Array] = {}
        self._plain: dict[int, tuple[Array, Array, Array]] = {}
        self._steps = PlainSteps()
        self._opening = threading.RLock()
        self._walking = threading.Lock()  # of all sets: prompts and decode steps share engines

    def cache(self, rows: int, tokens: int, *, record: bool = False, room: int | None = None) -> KvCache:
        """Make a cache whose rows are all free.

        Args:
            tokens: that a row may have; at most the model's context.
            record: keep every row's decisions.
            room: tokens that there is memory for at first, more when they come; None for all.
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
        """Make a cache whose rows are all acquired, as ``prefill`` and ``step`` take them."""
        cache = self.cache(rows, tokens, record=record, room=room)
        cache.acquire(rows)
        return cache

    def check_cache(self, cache: KvCache) -> None:
        """Raise DynexportError for a cache that is not one of this model's."""
        checked_kind("cache", cache, KvCache, "one of Executor.cache")
        if cache.manifest is self.manifest:
            return
        if cache.manifest.model != self.manifest.model or len(cache.lengths) != self.layout.places:
            raise DynexportError("cache: expected one of Executor.cache, found one of another model")

    def run(self, cache: KvCache, batch: Batch) -> StepResult:
        """Run a batch over its rows' caches.

        A decode step of all rows is one call. Several tokens of a row go together where the program takes them, in
        pieces of ``batch.chunk``; a prompt whose tokens compete for a layer is never cut. When a call fails, nothing of
        the batch counts.

        Raises:
            DynexportError: for a row that is free or named twice, what is no token, tokens that do not fit, a depth
                that the bundle does not have, decisions that no router makes, a cache in use by another thread, or a
                route that the contract calls an error.
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
        """Feed one generated token to each of some rows: ``run``, and faster where that is one plain call.

        Args:
            rows: of the cache, each once.
            tokens: one of each row.
            depths: of each row.
            lasting: whether the result is an array of its own; or memory that the cache's next run writes over.

        Returns:
            float32 [rows, vocab].
        """
        self.check_cache(cache)
        rows, tokens = checked_list("rows", rows, "rows"), checked_list("tokens", tokens, "token ids")
        if not rows:
            raise DynexportError("rows: expected at least one, found none")
        first, count = rows[0], len(rows)
        if not _is_plain(rows, tokens, depths):
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
            # Where decisions are counted, an interrupt may come between them.
            counted = self.reader.rows or cache.logs is not None
            with cache.as_it_was_on_error(rows) if counted else nullcontext():
                result = running.run(cache, call)
                cache.commit(call.rows, call.counts, result.entries, result.decisions)
            return result.logits[:, 0]

    def _plain_call(self, first: int, count: int, ids: Array, depth: Depth, lasting: bool) -> tuple[Running, Call]:
        """One token of each of some rows side by side. What is the same at every step is made once."""
        if count not in self._plain:
            wanted, forced = np.zeros((count, 1), np.int64), np.full((self.reader.rows, count, 1), -1, np.int64)
            self._plain[count] = np.ones(count, np.int64), wanted, forced
        counts, wanted, forced = self._plain[count]
        active = self._mask("decode", depth)
        lasting = lasting or bool(self.reader.rows)  # decisions are kept
        call = Call(slice(first, first + count), ids, counts, active, wanted, forced, False, lasting)
        return self.program("decode", depth), call

    def prefill(
        self,
        cache: KvCache,
        prompts: Sequence[Tokens],
        *,
        depth: Depth | None = None,
        chunk: int = CHUNK,
        all_logits: bool = False,
        logits_at: Sequence[Array] | None = None,
        forced: Sequence[Array] | None = None,
    ) -> list[Array]:
        """Run one prompt per row of a cache, on top of what it holds: ``run`` for all rows at once.

        Args:
            cache: all of its rows are acquired.
            depth: None for full depth.
            logits_at: int64 [K] per row, ascending places in its prompt: logits of these tokens only, if any.
            forced: as for ``Batch``.

        Returns:
            Per row float32 [1, vocab], the logits of its last token; or [len, vocab] with ``all_logits``; or [K, vocab]
            with ``logits_at``.
        """
        self.check_cache(cache)
        rows = checked_for_rows("prompts", prompts, cache.rows)
        wanted: Wanted = logits_at if logits_at is not None else "all" if all_logits else "last"
        depth = self.manifest.full if depth is None else depth
        return self.run(cache, Batch(range(cache.rows), rows, "prompt", depth, wanted, forced, chunk)).logits

    def step(
        self, cache: KvCache, tokens: Tokens, depth: Depth, live: Array | None = None, *, forced: Array | None = None
    ) -> Array:
        """Feed one generated token per row of a cache: ``run`` for all rows at once.

        Args:
            cache: all of its rows are acquired.
            tokens: int64 [rows].
            live: bool [rows]; the others have ended, and take no part. None for all.
            forced: int64 [R, rows].

        Returns:
            float32 [rows, vocab]; zeros for rows that have ended.
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
        """Load what runs a phase at a depth. Raises DynexportError for a depth that the bundle does not have."""
        key = phase, depth.name
        if key not in self._programs:
            with self._opening:
                self._programs[key] = self._opened(self._declared(phase, depth))
        return self._programs[key]

    def end_profiling(self) -> list[Path]:
        """Write the profiles of the graphs that were loaded; their paths."""
        return [engine.end_profiling() for engine in self._engines.values()]

    def _declared(self, phase: Phase, depth: Depth) -> Program:
        checked_kind("depth", depth, Depth, "one of Bundle.depth")
        return self.manifest.program(phase, depth)

    def _opened(self, program: Program) -> Running:
        engines = {name: self._engine(self.manifest.graph(name)) for name in program.names}
        if program.set is not None:
            return RunningSet(self.manifest, program.set, engines, self._walking)
        (engine,) = engines.values()
        return WholeStep(self.manifest, engine)

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
        """Bool [layers], those that run in a phase; computed once for every set of layers."""
        layers = depth.prompt if phase == "prompt" else depth.keep
        if layers not in self._masks:
            for layer in layers:
                checked_count("depth: a kept layer", layer, 0, self.manifest.model.layers - 1)
            self._masks[layers] = np.isin(np.arange(self.manifest.model.layers), layers)
        return self._masks[layers]


def _is_plain(rows: list[Any], tokens: list[Any], depths: Sequence[Depth]) -> bool:
    """Whether one token of each of some rows side by side is one call."""
    return (
        is_integer(rows[0])
        and len(tokens) == len(rows)
        and isinstance(depths, Sequence)
        and len(depths) == len(rows)
        and isinstance(depths[0], Depth)
        and rows == list(range(rows[0], rows[0] + len(rows)))
        and all(depth is depths[0] for depth in depths)
    )


def _joined(pieces: list[Array], nothing: Array) -> Array:
    return pieces[0] if len(pieces) == 1 else np.concatenate([nothing, *pieces])


__all__ = ["Executor", "Running"]
