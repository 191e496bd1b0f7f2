"""Replay of token sequences on the engine, as the reference runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from dynexport.exporter.parity.metrics import FloatArray
from dynexport.exporter.reference import Case, RowPaths, RowRoutes
from dynexport.runtime.bundle.manifest import Depth, PathRouting
from dynexport.runtime.execution.batch import CHUNK
from dynexport.runtime.execution.decisions import DecisionReader, Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

Prompt: TypeAlias = Sequence[int]
Forced: TypeAlias = NDArray[np.bool_] | NDArray[np.int64]


def replay(
    executor: Executor,
    cases: Sequence[Case],
    *,
    cache: KvCache | None = None,
    chunk: int = CHUNK,
    forced: Sequence[Forced] | None = None,
    at: Sequence[int] = (),
) -> list[FloatArray]:
    """Run cases on the engine as one batch, with teacher forcing, and return their logits.

    Args:
        executor: runs the bundle.
        cases: rows of one depth. Prompts may differ in length; the number of later tokens may not. Only a single case
            may have more than one prompt.
        cache: an empty cache to use; None creates one.
        chunk: tokens per prefill chunk.
        forced: per case bool or int64 [R, length], routing decisions to apply instead of the routers' and the cases'.
        at: ascending positions whose logits are returned; empty means all.

    Returns:
        Per case float32 [length or positions, vocab], the logits after each of these tokens.
    """
    if forced is None:
        forced = [case.forced for case in cases if case.forced is not None] or None
    wanted = np.asarray(at, np.int64) if len(at) else np.arange(max(len(case.tokens) for case in cases))
    first = cases[0]
    cache = cache or executor.full_cache(len(cases), max(len(case.tokens) for case in cases))
    pieces: list[list[FloatArray]] = []
    done = np.zeros(len(cases), np.int64)
    ends = [start for start, _ in first.prompted[1:]] + [len(first.tokens)]
    for index, end in enumerate(ends):
        spans = [slice(*case.prompted[index]) for case in cases]
        prompts = [case.tokens[span] for case, span in zip(cases, spans, strict=True)]
        told = None if forced is None else [row[:, span] for row, span in zip(forced, spans, strict=True)]
        places = [wanted[(wanted >= span.start) & (wanted < span.stop)] - span.start for span in spans]
        pieces.append(executor.prefill(cache, prompts, depth=first.depth, chunk=chunk, logits_at=places, forced=told))
        done += [len(prompt) for prompt in prompts]
        for _ in range(end - first.prompted[index][1]):
            tokens = [case.tokens[at] for case, at in zip(cases, done, strict=True)]
            wish = None
            if forced is not None:
                wish = np.stack([row[:, at] for row, at in zip(forced, done, strict=True)], axis=1)
            logits = executor.step(cache, tokens, first.depth, forced=wish)
            pieces.append([row[None][: int(here in wanted)] for row, here in zip(logits, done, strict=True)])
            done += 1
    return [np.concatenate(row) for row in zip(*pieces, strict=True)]


def routes(cache: KvCache) -> list[RowRoutes] | list[RowPaths]:
    """Return the routing decisions that a cache has recorded, per row; empty for a bundle without routers."""
    routing, reader = cache.manifest.routing, DecisionReader(cache.manifest)
    rows = [reader.joined(log) for log in cache.logs or []]
    if isinstance(routing, PathRouting):
        layers = cache.manifest.model.layers
        return [_row_paths(row, layers) for row in rows]
    if routing is None:
        return []
    return [RowRoutes(row.choices == 1, row.scores, row.margins, row.overflow.copy()) for row in rows]


def _row_paths(row: Decisions, layers: int) -> RowPaths:
    depth = ((row.choices >= 0) & (row.choices < layers)).sum(axis=0)
    return RowPaths(row.choices, row.scores, row.margins, np.full_like(row.scores, np.nan), depth)


def generate(
    executor: Executor, cache: KvCache, logits: FloatArray, depth: Depth, count: int
) -> tuple[list[list[int]], list[FloatArray]]:
    """Continue every row greedily.

    Args:
        executor: runs the bundle.
        cache: holds the tokens so far.
        logits: float32 [rows, vocab], logits after the last token.
        depth: layers that run.
        count: number of decode steps.

    Returns:
        Per row the tokens that the steps ran, and float32 [count, vocab], the logits after each.
    """
    fed, found = [], []
    for _ in range(count):
        fed.append(logits.argmax(axis=-1))
        logits = executor.step(cache, fed[-1], depth)
        found.append(logits)
    if not fed:
        return [[] for _ in logits], [logits[:0] for _ in logits]
    return np.stack(fed, axis=1).tolist(), list(np.stack(found, axis=1))
