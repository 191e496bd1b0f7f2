"""A timed run of a bundle: prefill and decode steps, with the bytes and FLOPs that they need."""

from __future__ import annotations

import statistics
import time

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.engines.registry import RunBackend, Weights
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.cost import flops_of_prompts, read_bytes
from dynexport.runtime.measure.operator_times import operator_times
from dynexport.runtime.measure.other_work import OtherWork
from dynexport.runtime.measure.prescribed import Routes, as_routers_decide

Array = np.ndarray
WARM_UP_STEPS = 3


class Timed(BaseModel):
    """Result of one timed run.

    Attributes:
        prefill_seconds: time of the prefill; None where the cache held the prompts already.
        step_seconds: times of the decode steps, without the warm-up steps.
        processor_seconds: processor time that the machine had during the run.
        others_seconds: the part of it that other processes took; None where the system does not tell.
        bytes: bytes that all decode steps had to read, without the warm-up steps.
        flops: FLOPs of the prefill.
        layers: mean number of layers that a decoded token ran.
        turned_away: routing decisions that were dropped because a layer's cache or capacity was full, in prefill and
            decode steps.
    """

    prefill_seconds: float | None
    step_seconds: list[float]
    processor_seconds: float
    others_seconds: float | None
    bytes: int
    flops: int
    layers: float
    turned_away: int

    @property
    def decode_seconds(self) -> float:
        """Return the median time of one decode step."""
        return statistics.median(self.step_seconds)


class Sizes(BaseModel):
    """Sizes and settings that all runs of a comparison share.

    Attributes:
        rows: number of prompts that run together.
        prompt_tokens: length of every prompt.
        steps: number of timed decode steps, after the warm-up steps.
        threads: as for ``open_backend``.
        backend: as for ``open_backend``.
        weights: as for ``open_backend``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    prompt_tokens: int
    steps: int
    threads: int
    backend: RunBackend
    weights: Weights = "packed"

    @property
    def slots(self) -> int:
        """Return the tokens of a row: prompt, warm-up steps and timed steps."""
        return self.prompt_tokens + WARM_UP_STEPS + self.steps


class Runner:
    """A loaded bundle with a cache for timed runs; call ``warm_up`` first."""

    def __init__(self, bundle: Bundle, sizes: Sizes) -> None:
        self._count = sizes.steps
        self._executor = Executor(bundle, sizes.threads, backend=sizes.backend, weights=sizes.weights)
        self._cache = self._executor.full_cache(sizes.rows, sizes.slots, record=True)
        self._full = bundle.manifest.full

    def load(self) -> None:
        """Load the graphs of full depth."""
        self._executor.load(self._full)

    def first_token(self, prompts: Array) -> None:
        """Run the prompts of all later runs, int64 [rows, tokens]."""
        self._prompts = prompts
        self._prefill(self._full, None).argmax(axis=-1)

    def warm_up(self, prompts: Array) -> None:
        """Run the prompts of all later runs as ``first_token`` and one step, so that engines are loaded."""
        self.first_token(prompts)
        self._executor.step(self._cache, self._prompts[:, 0], self._full)

    def run(self, depth: Depth | None = None, routes: Routes = as_routers_decide) -> Timed:
        """Run the prompts and the decode steps, and return their times.

        Args:
            depth: layers that run; None for all. Routers choose among them.
            routes: prescribed routing decisions.
        """
        depth = depth or self._full
        told, other = routes(*self._prompts.shape), OtherWork()
        start = time.perf_counter()
        logits = self._prefill(depth, told)
        seconds = time.perf_counter() - start
        return self._steps(logits, depth, routes, seconds, other)

    def run_steps(self, depth: Depth) -> Timed:
        """Run decode steps only, after the prompts of the last run; for a bundle without routers."""
        first = np.zeros((self._cache.rows, 1), np.float32)
        return self._steps(first, depth, as_routers_decide, None, OtherWork())

    def operators(self) -> tuple[float, dict[str, float]]:
        """Return ``operator_times`` of a decode step after the last prompts."""
        return operator_times(self._executor, self._cache, self._full)

    def _prefill(self, depth: Depth, told: list[Array] | None) -> Array:
        for row in range(self._cache.rows):
            self._cache.rewind(row)
        return np.concatenate(self._executor.prefill(self._cache, list(self._prompts), depth=depth, forced=told))

    def _steps(self, logits: Array, depth: Depth, routes: Routes, prefill: float | None, other: OtherWork) -> Timed:
        """Run decode steps after the prompts in the cache; the cache is unchanged afterwards."""
        cache, manifest = self._cache, self._executor.manifest
        marks, entries = [cache.mark(row) for row in range(cache.rows)], cache.lengths.copy()
        prompts = [self._decided(row) for row in range(cache.rows)]
        told = routes(cache.rows, WARM_UP_STEPS + self._count)
        rows, depths = list(range(cache.rows)), [depth] * cache.rows
        times = []
        for step in range(WARM_UP_STEPS + self._count):
            tokens = logits.argmax(axis=-1)
            wish = None if told is None else np.stack([row[:, step] for row in told], axis=1)
            start = time.perf_counter()
            if wish is None:  # the call that a generation makes
                logits = self._executor.decode(cache, rows, tokens.tolist(), depths, lasting=False)
            else:
                logits = self._executor.step(cache, tokens, depth, forced=wish)
            times.append(time.perf_counter() - start)
        available, taken = other.taken()
        steps = [self._decided(mark.row, since=mark.steps) for mark in marks]
        layers = np.stack([self._executor.reader.layers_run(row) for row in steps])
        turned_away = int(cache.overflow.sum())
        for mark in marks:
            cache.truncate(mark.row, mark)
        return Timed(
            prefill_seconds=prefill,
            step_seconds=times[WARM_UP_STEPS:],
            processor_seconds=available,
            others_seconds=taken,
            bytes=sum(read_bytes(manifest, steps, entries)[WARM_UP_STEPS:]),
            flops=flops_of_prompts(manifest, prompts),
            layers=float(layers[:, WARM_UP_STEPS:].mean()),
            turned_away=turned_away,
        )

    def _decided(self, row: int, since: int = 0) -> Decisions:
        """Return the decisions for a row's tokens, from one piece of its log on."""
        assert self._cache.logs is not None
        return self._executor.reader.joined(self._cache.logs[row][since:])


__all__ = ["WARM_UP_STEPS", "Runner", "Sizes", "Timed"]
