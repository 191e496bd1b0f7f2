"""The load of the serving benchmarks and the figures of a run: numpy only, for interpreters without dynexport too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Needs nothing of dynexport, which an interpreter of another runtime lacks.
sys.path.append(str(Path(__file__).resolve().parents[1] / "runtime" / "measure"))
from other_work import OtherWork

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


__all__ = ["Asked", "OtherWork", "draw", "draw_plain", "figures"]
