"""Rows of one batch, each at a depth of its own, beside the same rows alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor


def assert_as_alone(bundle: Bundle, depths: Sequence[str], vocabulary: int) -> None:
    """Run three random prompts and two decode steps, together and each alone, at the named depths."""
    executor, random = Executor(bundle, threads=1), np.random.default_rng(6)
    rows, at = [random.integers(0, vocabulary, length) for length in (7, 3, 5)], [bundle.depth(name) for name in depths]
    together, alone = executor.full_cache(3, 16), []
    found = [executor.run(together, Batch(range(3), rows, "prompt", at)).logits]
    found += [executor.run(together, Batch(range(3), [[7]] * 3, "decode", at)).logits for _ in range(2)]
    for row, depth in zip(rows, at, strict=True):
        cache = executor.full_cache(1, 16)
        logits = executor.prefill(cache, [row], depth=depth)
        alone.append(np.concatenate([*logits, *(executor.step(cache, [7], depth) for _ in range(2))]))
    for parts, own in zip(zip(*found, strict=True), alone, strict=True):
        assert np.abs(np.concatenate(parts) - own).max() < 1e-4
