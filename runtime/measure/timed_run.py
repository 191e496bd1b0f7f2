"""One timed run of a bundle: a prompt and the decode steps after it, and what they had to read and to compute."""

from __future__ import annotations

import statistics
import time

import numpy as np
from pydantic import BaseModel, ConfigDict

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import Depth, Manifest
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.execution.cache import Entries
from dynexport.runtime.execution.decoders import open_decoder
from dynexport.runtime.measure.cost import attended, path_bytes, path_flops, prompt_flops, realised_bytes
from dynexport.runtime.measure.operator_times import operator_times
from dynexport.runtime.measure.prescribed import Routes, as_routers_decide

Array = np.ndarray
WARM_UP_STEPS = 3


class Timed(BaseModel):
    """What one run came to.

    Attributes:
        prefill_seconds: of the prompt; None where the cache held it already.
        decode_seconds: of one step, the median.
        bytes: that all its steps had to read, those of the warm-up left out.
        flops: of the prompt.
        layers: that a decoded token ran in, on average.
        turned_away: how often a full layer had no room for a token, prompt and steps together.
    """

    prefill_seconds: float | None
    decode_seconds: float
    bytes: int
    flops: int
    layers: float
    turned_away: int


class Sizes(BaseModel):
    """What all runs of a comparison have in common.

    Attributes:
        rows: prompts that run together.
        prompt_tokens: of each of them.
        steps: decode steps that are timed, after some of warm-up.
        threads, backend: as for ``engine_opener``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: int
    prompt_tokens: int
    steps: int
    threads: int
    backend: RunBackend

    @property
    def slots(self) -> int:
        """Tokens of a row, from the first of its prompt to the last step."""
        return self.prompt_tokens + WARM_UP_STEPS + self.steps


class Runner:
    """A bundle, loaded, and a cache for its runs; ``warm_up`` comes first."""

    def __init__(self, bundle: Bundle, sizes: Sizes) -> None:
        self._count = sizes.steps
        self._decoder = open_decoder(bundle, sizes.threads, backend=sizes.backend)
        self._cache = self._decoder.cache(sizes.rows, sizes.slots, record=True)
        self._full = bundle.depth(1)

    def warm_up(self, prompts: Array) -> None:
        """Run these prompts, int64 [rows, tokens], and a step: engines are loaded then. All runs have these prompts."""
        self._prompts = prompts
        self._prefill(None)
        self._decoder.step(self._cache, self._prompts[:, 0], self._full)

    def run(self, speedup: Depth | None = None, routes: Routes = as_routers_decide) -> Timed:
        """Time the prompts and the steps.

        Args:
            speedup: which layers a step runs; None for all.
            routes: what routers are told.
        """
        told = routes(*self._prompts.shape)
        start = time.perf_counter()
        logits = self._prefill(told)
        seconds = time.perf_counter() - start
        flops = _flops(self._decoder.manifest, self._cache)
        return self._steps(logits, speedup or self._full, routes, flops, seconds)

    def run_steps(self, speedup: Depth) -> Timed:
        """Time the steps only, after the prompts of the last run; of a bundle without routers."""
        logits = np.zeros((self._cache.rows, 1), np.float32)
        return self._steps(logits, speedup, as_routers_decide, _flops(self._decoder.manifest, self._cache), None)

    def operators(self) -> tuple[float, dict[str, float]]:
        """Of a step after the last prompt, as ``operator_times``."""
        return operator_times(self._decoder, self._cache, self._full)

    def _prefill(self, told: list[Array] | None) -> Array:
        self._cache.rewind()
        return np.concatenate(self._decoder.prefill(self._cache, list(self._prompts), forced=told))

    def _steps(self, logits: Array, speedup: Depth, routes: Routes, flops: int, prefill: float | None) -> Timed:
        """Time the steps after a prompt that the cache holds; it is left as it was."""
        cache, mark = self._cache, self._cache.mark()
        for log in cache.logs or ():
            log.clear()
        told = routes(cache.rows, WARM_UP_STEPS + self._count)
        times = []
        for step in range(WARM_UP_STEPS + self._count):
            tokens = logits.argmax(axis=-1)
            wish = None if told is None else np.stack([row[:, step] for row in told], axis=1)
            start = time.perf_counter()
            logits = self._decoder.step(cache, tokens, speedup, forced=wish)
            times.append(time.perf_counter() - start)
        read, depths = _read(self._decoder.manifest, cache, mark[0])
        turned_away = int(cache.overflow.sum())
        cache.restore(mark)
        return Timed(
            prefill_seconds=prefill,
            decode_seconds=statistics.median(times[WARM_UP_STEPS:]),
            bytes=sum(read[WARM_UP_STEPS:]),
            flops=flops,
            layers=float(depths[WARM_UP_STEPS:].mean()),
            turned_away=turned_away,
        )


def _flops(manifest: Manifest, cache: Entries) -> int:
    """Of the prompt that the cache holds."""
    paths = [path for log in cache.logs or () for path in log.paths]
    if not paths:
        return prompt_flops(manifest, cache.lengths)
    return path_flops(manifest, cache.lengths, sum(int((path >= 0).sum()) for path in paths))


def _read(manifest: Manifest, cache: Entries, entries: Array) -> tuple[list[int], Array]:
    """Bytes that each of the recorded steps had to read, and layers that each row ran in, int64 [steps, rows].

    Args:
        entries: int64 [layers or steps, rows], in the cache before them.
    """
    logs = cache.logs or []
    if not logs[0].paths:
        ran = np.stack([np.concatenate(log.ran, axis=1) for log in logs], axis=2)
        after = entries[:, None] + ran.cumsum(axis=1)
        return [realised_bytes(manifest, ran[:, t], after[:, t]) for t in range(ran.shape[1])], ran.sum(axis=0)
    paths = np.stack([np.concatenate(log.paths, axis=1) for log in logs], axis=2)
    ran = (paths >= 0) & (paths < manifest.model.layers)
    seen = [attended(manifest, paths[:, :t], entries) for t in range(1, 1 + paths.shape[1])]
    return [path_bytes(manifest, paths[:, t], seen[t]) for t in range(paths.shape[1])], ran.sum(axis=0)


__all__ = ["WARM_UP_STEPS", "Runner", "Sizes", "Timed"]
