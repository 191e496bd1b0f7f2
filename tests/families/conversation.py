"""A conversation forced through PyTorch and through a bundle, compared after every token.

A prompt, generated tokens in one kept set, a second prompt on top of the same cache, generated tokens in another kept
set. After it the skipped layers' caches have gaps, so that original positions (rotary, ALiBi, windows) differ from the
entries' places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tiny_models import LAYERS, random_rows

from dynexport.exporter.reference import Reference
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

PROMPTS = (1, 2, 9, 23)
SECOND_PROMPTS = (6, 1, 3, 11)
GENERATED = 4
SLOTS = max(p + s for p, s in zip(PROMPTS, SECOND_PROMPTS, strict=True)) + 2 * GENERATED
EVERYTHING = tuple(range(LAYERS))
Keep = tuple[int, ...]


@dataclass(frozen=True)
class Conversation:
    """Rows of four parts each, and the logits after every token of them.

    Attributes:
        parts: prompts, generated tokens, second prompts, generated tokens; each a list of token ids by row.
        kept: the layers that each part runs in.
        expected: float32 [length, vocabulary] by row.
    """

    parts: tuple[list[list[int]], ...]
    kept: tuple[Keep, ...]
    expected: list[np.ndarray]

    @classmethod
    def forced(cls, reference: Reference, first: Keep, second: Keep) -> Conversation:
        """The same random tokens every time; generated ones run in ``first``, later in ``second``."""
        generated = [GENERATED] * len(PROMPTS)
        lengths = (PROMPTS, generated, SECOND_PROMPTS, generated)
        parts = tuple(random_rows(*part, seed=seed) for seed, part in enumerate(lengths))
        kept = (EVERYTHING, first, EVERYTHING, second)
        rows, runs = [], []
        for row in zip(*parts, strict=True):
            rows.append([token for part in row for token in part])
            columns = [np.isin(EVERYTHING, keep) for keep, part in zip(kept, row, strict=True) for _ in part]
            runs.append(np.stack(columns, axis=1))
        return cls(parts, kept, reference.logits(rows, runs))


def follow(executor: Executor, talk: Conversation, rows: Sequence[int], chunk: int = SLOTS) -> np.ndarray:
    """Errors of all logits of some rows, taken as one batch, in units of the row's standard deviation."""
    cache = executor.full_cache(len(rows), SLOTS)
    errors = []

    def compare(found: Sequence[np.ndarray], begin: np.ndarray) -> None:
        for logits, row, start in zip(found, rows, begin, strict=True):
            expected = talk.expected[row][start : start + len(logits)]
            errors.append(np.abs(logits - expected).ravel() / talk.expected[row].std())

    for number, (part, keep) in enumerate(zip(talk.parts, talk.kept, strict=True)):
        tokens = [part[row] for row in rows]
        if number % 2 == 0:
            begin = cache.positions.copy()
            compare(executor.prefill(cache, tokens, chunk=chunk, all_logits=True), begin)
            continue
        for step in zip(*tokens, strict=True):
            begin = cache.positions.copy()
            compare(generate(executor, cache, step, keep), begin)
    return np.concatenate(errors)


def generate(executor: Executor, cache: KvCache, tokens: Sequence[int], keep: Keep) -> np.ndarray:
    """One generated token per row: float32 [rows, 1, vocabulary]."""
    declared = (executor.manifest.full, *executor.manifest.depths)
    other = Depth(name="test", ratio=None, keep=keep, prompt=EVERYTHING)
    return executor.step(cache, tokens, next((depth for depth in declared if depth.keep == keep), other))[:, None]
