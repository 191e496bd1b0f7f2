"""Checks of a Radial Network's decode step in one graph, beside the set of graphs that it replaces."""

from __future__ import annotations

import numpy as np
from tiny_models import random_rows

from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache


def assert_same_as_by_the_set(both: tuple[Executor, Executor], hops: int) -> None:
    """What is chosen, logged and counted: with a row that has ended, and with paths that are forced."""
    random, caches, logits = np.random.default_rng(1), [], []
    layers = both[0].manifest.model.layers
    forced = random.integers(0, layers + 1, (hops, 3))
    forced[:, 0] = -1
    for executor in both:
        cache, full = executor.full_cache(3, 12, record=True), executor.manifest.full
        executor.prefill(cache, random_rows(7, 2, 5, vocabulary=50))
        steps = [executor.step(cache, [5, 6, 7], full), executor.step(cache, [8, 9, 10], full, forced=forced)]
        ended = executor.step(cache, [1, 2, 3], full, np.array([True, False, True]))
        caches.append(cache)
        logits.append(np.concatenate([*steps, ended[[0, 2]]]))
    ours, theirs = caches
    assert np.abs(logits[0] - logits[1]).max() < 1e-4
    assert (ours.lengths == theirs.lengths).all() and (ours.positions == theirs.positions).all()
    reader = both[0].reader
    for one, other in zip(map(reader.joined, ours.logs), map(reader.joined, theirs.logs), strict=True):
        for part in ("ran", "choices", "scores", "margins"):
            first, second = getattr(one, part), getattr(other, part)
            assert first.dtype == second.dtype and np.allclose(first, second, atol=1e-4), part
    assert len({(path >= 0).sum() for log in ours.logs for step in log for path in step.choices.T}) > 1


def assert_an_ended_row_is_not_in_the_way(executor: Executor, context: int) -> tuple[KvCache, KvCache]:
    """Its caches are full; the other row goes on as if it were alone. Returns the caches of both, and of the other."""
    full = executor.manifest.full
    ended, going = random_rows(context, 4, vocabulary=50)
    cache, alone = executor.full_cache(2, context), executor.full_cache(1, context)
    executor.prefill(cache, [ended, going])
    executor.prefill(alone, [going])
    before = cache.lengths[:, 0].copy()
    for token in (3, 4):
        logits = executor.step(cache, [0, token], full, np.array([False, True]))
        assert np.abs(logits[1] - executor.step(alone, [token], full)[0]).max() < 1e-4
    assert (cache.lengths[:, 0] == before).all() and cache.positions.tolist() == [context, 6]
    return cache, alone
