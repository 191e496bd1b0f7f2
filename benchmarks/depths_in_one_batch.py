"""Rows of one batch at different depths: one call a depth, against one call in which each layer takes its own rows.

A llama of SmolLM2-135M's sizes with random weights, some rows at full depth, the others in every other layer, in fp32
and int4. ``calls`` is a Unified Skip bundle, whose ``layer_active`` [L] is for all rows of a call: a call a depth.
``rows`` is what a ``layer_active`` [L, B] would be lowered to: the compaction that Mixture-of-Depths has, with the kept
layers forced row by row. The ways are timed in turn. A further table has one range of rows with idle rows between,
against two calls.

Prints medians in milliseconds and of the ratios of neighbours. docs/benchmarks.md quotes them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import mod_routers
from random_llama import save_llama

from dynexport.exporter import convert
from dynexport.runtime import Bundle
from dynexport.runtime.execution import calls as cutter
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor

LAYERS, PROMPT = 30, 256
# Rows of a batch, and how many of them are shallow.
CASES = ((8, 0), (8, 1), (8, 4), (8, 8), (1, 0), (1, 1))
SKIPPED = tuple(range(1, LAYERS - 1, 2))
SIZES = {"layers": LAYERS, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152}


def bundles(directory: Path, precision: str) -> tuple[Bundle, Bundle]:
    """The same weights for ``calls`` and for ``rows``."""
    contract = {"strategy": "mod", "routed_layers": list(SKIPPED), "decision": {"rule": "always"}}
    source = directory / "model"
    if not source.exists():
        save_llama(source, **SIZES, max_length=512, contract=contract, routers=mod_routers(SKIPPED, SIZES["hidden"]))
    found = []
    keep = [layer for layer in range(LAYERS) if layer not in SKIPPED]
    for name, options in (("calls", {"strategy": "unified-skip", "keep": keep}), ("rows", {})):
        output = directory / f"{name}-{precision}"
        convert(source, output, precision=precision, golden=False, **options)
        found.append(Bundle.open(output))
    return found[0], found[1]


def step(bundle: Bundle, threads: int, rows: int, shallow: int) -> Callable[[], object]:
    """Return what runs one decode step, the last rows in the kept layers; the cache stays as it was."""
    executor = Executor(bundle, threads)
    cache = executor.full_cache(rows, PROMPT + 8)
    rng = np.random.default_rng(0)
    executor.prefill(cache, list(rng.integers(0, SIZES["vocabulary"], (rows, PROMPT))))
    marks = [cache.mark(row) for row in range(rows)]
    tokens = [np.array([7])] * rows
    depths = [bundle.depth("keep" if row >= rows - shallow and bundle.manifest.depths else 1) for row in range(rows)]
    runs = [np.full((len(SKIPPED), 1), row < rows - shallow) for row in range(rows)]
    batch = Batch(range(rows), tokens, "decode", depths, "last", runs if executor.reader.rows else None)

    def run() -> None:
        executor.run(cache, batch)
        for mark in marks:
            cache.truncate(mark.row, mark)

    return run


def idle_rows(bundle: Bundle, threads: int, idle: int) -> Callable[[], object]:
    """Return a function that runs a decode step of two rows, with some idle rows between them."""
    executor = Executor(bundle, threads)
    cache = executor.full_cache(idle + 2, PROMPT + 8)
    rng = np.random.default_rng(0)
    executor.prefill(cache, list(rng.integers(0, SIZES["vocabulary"], (idle + 2, PROMPT))))
    rows = [0, idle + 1]
    marks = [cache.mark(row) for row in rows]
    batch = Batch(rows, [np.array([7])] * 2, "decode", bundle.depth(1))

    def run() -> None:
        executor.run(cache, batch)
        for mark in marks:
            cache.truncate(mark.row, mark)

    return run


def timed(ways: list[Callable[[], object]], repeats: int) -> tuple[list[float], float]:
    """Median milliseconds of each way, and the median ratio of the last to the first, measured in turn."""
    for way in ways:
        way(), way()
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for way, own in zip(ways, times, strict=True):
            start = time.perf_counter()
            way()
            own.append(1e3 * (time.perf_counter() - start))
    ratios = [last / first for first, last in zip(times[0], times[-1], strict=True)]
    return [statistics.median(own) for own in times], statistics.median(ratios)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        for precision in ("fp32", "int4"):
            calls, rows = bundles(Path(directory), precision)
            for count, shallow in CASES:
                ways = [step(bundle, options.threads, count, shallow) for bundle in (calls, rows)]
                (first, second), ratio = timed(ways, options.repeats)
                name = f"{precision}, {shallow} of {count} rows shallow"
                print(f"{name}: calls {first:.1f} ms, rows {second:.1f} ms, {ratio:.2f}x")
            for idle in (1, 2, 3, 4, 6):
                ways = []
                for most in (100, 0):
                    run = idle_rows(calls, options.threads, idle)

                    def way(run: Callable[[], object] = run, most: int = most) -> None:
                        cutter._MOST_IDLE = most
                        run()

                    ways.append(way)
                medians, ratio = timed(ways, options.repeats)
                one, two = medians
                print(f"{precision}, {idle} idle between: one call {one:.1f} ms, two {two:.1f} ms, {ratio:.2f}x")


if __name__ == "__main__":
    main()
