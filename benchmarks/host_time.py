"""Time of a greedy decode step at batch 1 that is spent in Python, outside the engine's run.

    python benchmarks/host_time.py BUNDLE --depth 2

Streams tokens after a prompt of 64 random ones, as ``Model.stream`` gives them to a user: sampling, decoding text and
stop strings are counted. Prints the median and the least milliseconds of a step, inside and outside
``InferenceSession.run_with_iobinding``. docs/benchmarks.md quotes the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import onnxruntime

import dynexport

STEPS, WARM_UP = 200, 20


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--depth", default="full")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    inside = 0.0
    run = onnxruntime.InferenceSession.run_with_iobinding

    def timed(session: Any, *arguments: Any) -> Any:
        nonlocal inside
        start = time.perf_counter()
        result = run(session, *arguments)
        inside += time.perf_counter() - start
        return result

    onnxruntime.InferenceSession.run_with_iobinding = timed
    model = dynexport.load(options.bundle, threads=options.threads)
    prompt = np.random.default_rng(0).integers(0, model.bundle.manifest.model.vocab_size, 64)
    stream = model.stream([prompt], depth=options.depth, max_new_tokens=WARM_UP + STEPS + 1)
    engine, host = [], []
    for step in range(WARM_UP + STEPS):
        inside = 0.0
        start = time.perf_counter()
        next(stream)
        whole = time.perf_counter() - start
        if step >= WARM_UP:
            engine.append(1e3 * inside)
            host.append(1e3 * (whole - inside))
    for name, times in (("engine", engine), ("Python", host)):
        print(f"{name}: median {statistics.median(times):.3f} ms, least {min(times):.3f} ms")


if __name__ == "__main__":
    main()
