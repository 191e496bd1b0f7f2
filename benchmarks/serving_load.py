"""The load of the serving benchmarks and the figures of a run: numpy only, for interpreters without dynexport too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Array = np.ndarray
# Ids below it are special tokens and single bytes in most vocabularies.
_FIRST_PLAIN = 300


class Asked(NamedTuple):
    """A request: a prompt, int64 [tokens], and the number of new tokens."""

    prompt: Array
    new_tokens: int


def draw(vocabulary: int, count: int, seed: int = 0) -> list[Asked]:
    """Return random requests, the same for every call: prompts of 16 to 256 tokens, 8 to 128 new ones."""
    rng = np.random.default_rng(seed)
    return [Asked(rng.integers(0, vocabulary, rng.integers(16, 257)), int(rng.integers(8, 129))) for _ in range(count)]


def draw_plain(vocabulary: int, count: int, seed: int = 0) -> list[Asked]:
    """Return the requests of ``draw`` without special tokens, which runtimes treat differently."""
    return [one._replace(prompt=np.maximum(one.prompt, _FIRST_PLAIN)) for one in draw(vocabulary, count, seed)]


def figures(begun: float, times: Sequence[Sequence[float]], tokens: int) -> dict[str, float]:
    """Return the figures of a run: tokens/s, seconds to the first token, and milliseconds between tokens.

    Args:
        begun: when the requests were sent, in seconds.
        times: per request, when its tokens came.
        tokens: number of tokens of all answers.
    """
    first = [each[0] - begun for each in times]
    gaps = np.concatenate([1e3 * np.diff(each) for each in times])
    return {
        "tokens_per_second": tokens / (max(each[-1] for each in times) - begun),
        "first_median": float(np.median(first)),
        "first_99": float(np.quantile(first, 0.99)),
        "gap_median": float(np.median(gaps)),
        "gap_99": float(np.quantile(gaps, 0.99)),
    }


class OtherWork:
    """Measures what disturbs a measurement: the processor time of processes that do not belong to it.

    Args:
        servers: ids of processes that belong to it, beside this one.
    """

    def __init__(self, *servers: int) -> None:
        self._servers = servers
        self._begun = self._now()

    def share(self) -> float:
        """Return the share of the machine's processors that other processes took until now, 0 to 1."""
        seconds, busy, own = (late - early for early, late in zip(self._begun, self._now(), strict=True))
        return float(max(0.0, (busy - own) / seconds / (os.cpu_count() or 1)))

    def _now(self) -> tuple[float, float, float]:
        """Return seconds of the clock, of all processors and of the own processes."""
        ticks = os.sysconf("SC_CLK_TCK")
        machine = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        busy, own = sum(machine) - machine[3] - machine[4], 0
        for pid in self._servers:
            # The name of the program, in parentheses, may contain spaces.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += int(fields[11]) + int(fields[12])
        return time.perf_counter(), busy / ticks, own / ticks + time.process_time()
