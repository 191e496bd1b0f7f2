"""Measure the time to choose tokens per decode step: rows of 49,152 logits, the minimum of many calls, one thread.

Three kinds of logits: those of a trained model (a .npy file, float32 [rows, vocab], where one is given), peaked ones
that resemble them, and flat ones, where a nucleus has most of the vocabulary. docs/benchmarks.md quotes the figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime import Sampling
from dynexport.runtime.generation.sampler import RowSampler, choose

VOCABULARY = 49_152
OPTIONS = {
    "greedy": Sampling(),
    "temperature 1": Sampling(temperature=1.0, seed=1),
    "temperature 0.8, top_p 0.95": Sampling(temperature=0.8, top_p=0.95, seed=1),
    "top_p 0.95": Sampling(temperature=1.0, top_p=0.95, seed=1),
    "top_k 50": Sampling(temperature=1.0, top_k=50, seed=1),
    "top_k 50, top_p 0.95": Sampling(temperature=1.0, top_k=50, top_p=0.95, seed=1),
    "min_p 0.05": Sampling(temperature=1.0, min_p=0.05, seed=1),
    "greedy, three penalties": Sampling(repetition_penalty=1.1, frequency_penalty=0.5, presence_penalty=0.5),
    "greedy, 20 logprobs": Sampling(logprobs=20),
}


def least(call: Callable[[], object], seconds: float) -> float:
    """Return milliseconds of the fastest call."""
    found, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found = min(found, time.perf_counter() - start)
    return found * 1e3


def made_up(rows: int) -> dict[str, NDArray[np.float32]]:
    """Return peaked logits (N(0, 3), with 40 tokens of each row raised by 8 to 18) and flat ones (N(0, 1))."""
    draws = np.random.default_rng(7)
    peaked = draws.normal(0, 3, (rows, VOCABULARY))
    for row in peaked:
        row[draws.choice(VOCABULARY, 40, replace=False)] += draws.uniform(8, 18, 40)
    flat = draws.normal(0, 1, (rows, VOCABULARY))
    return {"peaked": peaked.astype(np.float32), "flat": flat.astype(np.float32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logits", help="a .npy file, float32 [rows, vocab]")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    arguments = parser.parse_args()
    kinds = made_up(32)
    if arguments.logits:
        real = np.load(arguments.logits)
        kinds = {"trained": np.resize(real, (32, real.shape[1])), **kinds}
    for kind, logits in kinds.items():
        for name, sampling in OPTIONS.items():
            figures = []
            for count in (1, 8, 32):
                rows = [RowSampler(sampling, seed_index=row) for row in range(count)]
                for row in rows:
                    row.see_prompt(range(500))
                figures.append(least(lambda: choose(logits[:count], rows), arguments.seconds))  # noqa: B023
            print(f"{kind:8} {name:28} " + " ".join(f"{figure:8.3f}" for figure in figures))


if __name__ == "__main__":
    main()
