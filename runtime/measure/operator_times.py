"""Time of a decode step by operator, from ONNX Runtime's profiler."""

from __future__ import annotations

import collections
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

_STEPS = 8
# They contain other operators, whose time would be counted twice.
_CONTAINERS = frozenset({"If", "Loop", "Scan"})


def operator_times(executor: Executor, cache: KvCache, depth: Depth) -> tuple[float, dict[str, float]]:
    """Return how the time of a decode step is spent, measured in new sessions with profiling.

    Args:
        executor: its bundle and threads are used.
        cache: a cache with a prompt in every row and room for one more token; it is unchanged afterwards.
        depth: layers that run.

    Returns:
        The share of a step's wall time inside the engine, and operator -> share of all operators' time, largest first.
    """
    with tempfile.TemporaryDirectory() as directory:
        prefix = Path(directory) / "profile"
        profiled = Executor(executor.bundle, executor.threads, profile=prefix, weights=executor.weights)
        tokens = np.ones(cache.rows, np.int64)
        marks = [cache.mark(row) for row in range(cache.rows)]
        wall = 0.0
        for number in range(1 + _STEPS):
            start = time.perf_counter()
            profiled.step(cache, tokens, depth)
            wall += time.perf_counter() - start if number else 0  # the first step loads the engine
            # The same step is repeated, because the cache may have room for one token only.
            for mark in marks:
                cache.truncate(mark.row, mark)
        sessions = [json.loads(path.read_text()) for path in profiled.end_profiling()]
    inside = 0.0
    times: collections.Counter[str] = collections.Counter()
    for events in sessions:
        runs = [event for event in events if event.get("name") == "model_run"]
        if runs := runs[len(runs) // (_STEPS + 1) :]:  # without the first step's
            inside += sum(run["dur"] for run in runs) / 1e6
            times += _kernel_times(events, runs[0]["ts"])
    everything = times.total() or 1
    return inside / wall, {operator: duration / everything for operator, duration in times.most_common()}


def _kernel_times(events: list[dict[str, Any]], since: int) -> collections.Counter[str]:
    """Return operator -> microseconds of the events from ``since`` on."""
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] >= since:
            operator = event["args"]["op_name"]
            if operator not in _CONTAINERS:
                times[operator] += event["dur"]
    return times


__all__ = ["operator_times"]
