"""Where a decode step's time goes, by ONNX Runtime's own profiler."""

from __future__ import annotations

import collections
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from dynexport.runtime.cache import Cache
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.manifest import Speedup

_STEPS = 8
# These contain other operators, whose time would be counted twice.
_CONTAINERS = frozenset({"If", "Loop", "Scan"})


def operator_times(decoder: Decoder, cache: Cache, speedup: Speedup) -> tuple[float, dict[str, float]]:
    """Profile a few steps in a session of its own.

    Args:
        cache: holding a prompt, with room for a token; left as it was.

    Returns:
        The engine's share of a step's wall time, and operator -> share of all operators' time, largest first.
    """
    with tempfile.TemporaryDirectory() as directory:
        profiled = Decoder(decoder.bundle, decoder.threads, profile=Path(directory) / "profile")
        tokens = np.ones(cache.rows, np.int64)
        mark = cache.mark()
        profiled.step(cache, tokens, speedup)
        start = time.perf_counter()
        for _ in range(_STEPS):
            # Always the same step: the cache may have room for few.
            cache.restore(mark)
            profiled.step(cache, tokens, speedup)
        wall = time.perf_counter() - start
        cache.restore(mark)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    runs = [event for event in events if event.get("name") == "model_run"][-_STEPS:]
    first = runs[0]["ts"]
    times: collections.Counter[str] = collections.Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time") and event["ts"] >= first:
            operator = event["args"]["op_name"]
            if operator not in _CONTAINERS:
                times[operator] += event["dur"]
    everything = times.total() or 1
    shares = {operator: duration / everything for operator, duration in times.most_common()}
    return sum(run["dur"] for run in runs) / 1e6 / wall, shares
