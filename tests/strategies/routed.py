"""A conversation forced through a routed bundle and through PyTorch: every decision and every logit compared.

A prompt, generated tokens, a second prompt on top of the same cache, generated tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tiny_models import random_rows

from dynexport.exporter.reference import RowRoutes
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.runtime.bundle.manifest import LayerRouting
from dynexport.runtime.execution.batch import CHUNK
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

CONTEXT = 48
# Nearer to the other decision, rounding may decide.
NEAR = 1e-5
Part = list[list[int]]


@dataclass(frozen=True)
class Talk:
    """Prompts and generated tokens in turn, each a list of token ids by row."""

    parts: tuple[Part, ...]

    @classmethod
    def random(cls, *lengths: Sequence[int], seed: int = 0) -> Talk:
        """Random tokens; each part's lengths by row, those of a generated part alike."""
        return cls(tuple(random_rows(*part, seed=seed + number) for number, part in enumerate(lengths)))

    def of_rows(self, rows: Sequence[int]) -> Talk:
        return Talk(tuple([part[row] for row in rows] for part in self.parts))

    @property
    def rows(self) -> list[list[int]]:
        """All tokens of every row."""
        return [[token for part in row for token in part] for row in zip(*self.parts, strict=True)]

    @property
    def prompted(self) -> list[list[tuple[int, int]]]:
        """Of every row, where its prompts stand."""
        spans = []
        for row in zip(*self.parts, strict=True):
            bounds = np.cumsum([0, *map(len, row)]).tolist()
            spans.append([(bounds[i], bounds[i + 1]) for i in range(0, len(row), 2)])
        return spans


@dataclass(frozen=True)
class Row:
    """What became of one row.

    Attributes:
        logits: float32 [tokens, vocabulary].
        chosen, scores, margins: [R, tokens].
        overflow: int64 [R].
    """

    logits: np.ndarray
    chosen: np.ndarray
    scores: np.ndarray
    margins: np.ndarray
    overflow: np.ndarray


def follow(
    executor: Executor,
    talk: Talk,
    *,
    chunk: int = CHUNK,
    forced: Sequence[np.ndarray] | None = None,
    cache: KvCache | None = None,
) -> list[Row]:
    """Take all rows of a conversation as one batch.

    Args:
        forced: bool [R, all tokens] by row.
    """
    count = len(talk.parts[0])
    cache = executor.full_cache(count, CONTEXT, record=True) if cache is None else cache
    logits: list[list[np.ndarray]] = [[] for _ in range(count)]
    for number, part in enumerate(talk.parts):
        if number % 2 == 0:
            found = executor.prefill(cache, part, chunk=chunk, all_logits=True, forced=_next(forced, cache, part))
            for row, of_row in zip(logits, found, strict=True):
                row.append(of_row)
            continue
        for tokens in zip(*part, strict=True):
            wishes = _next(forced, cache, [[token] for token in tokens])
            wish = None if wishes is None else np.concatenate(wishes, axis=1)
            found = executor.step(cache, tokens, executor.bundle.depth(None), forced=wish)
            for row, of_row in zip(logits, found, strict=True):
                row.append(of_row[None])
    return [finished(executor, cache, row, parts) for row, parts in enumerate(logits)]


def finished(executor: Executor, cache: KvCache, row: int, logits: list[np.ndarray]) -> Row:
    """A row of a recorded cache."""
    log, routing = executor.reader.joined(cache.logs[row]), executor.manifest.routing
    assert isinstance(routing, LayerRouting)
    routed, ran = list(routing.layers), log.ran
    by_layer = log.choices.reshape(len(routed), len(routing.parts), -1)
    assert (ran[routed] == by_layer.max(axis=1)).all() and (log.overflow == cache.overflow[:, row]).all()
    assert np.delete(ran, routed, axis=0).all(), "a layer without a router left tokens out"
    entries = np.ones_like(ran)
    if routing.skipped_kv == "none":
        entries[routed] = by_layer[:, 0]
    assert (cache.lengths[:, row] == entries.sum(1)).all(), "entries"
    return Row(np.concatenate(logits), log.choices == 1, log.scores, log.margins, cache.overflow[:, row].copy())


def _next(forced: Sequence[np.ndarray] | None, cache: KvCache, part: Part) -> list[np.ndarray] | None:
    if forced is None:
        return None
    starts = zip(forced, cache.positions.tolist(), part, strict=True)
    return [wish[:, seen : seen + len(tokens)] for wish, seen, tokens in starts]


def compare(
    golden: tuple[ModReference, list[tuple[np.ndarray, RowRoutes]]], run: Executor, talk: Talk, tolerance: float = 1e-4
) -> None:
    """The rows together, and two of them alone."""
    model, expected = golden
    together = follow(run, talk)
    for row in range(len(expected)):
        assert error(together[row], model, talk, row, expected[row]) < tolerance, f"row {row} of the batch"
    for row in (0, 4):
        [alone] = follow(run, talk.of_rows([row]))
        assert error(alone, model, talk, row, expected[row]) < tolerance, f"row {row} alone"


def error(found: Row, golden: ModReference, talk: Talk, row: int, expected: tuple[np.ndarray, RowRoutes]) -> float:
    """Largest error of a row's logits in units of their standard deviation; its decisions are asserted.

    Where rounding has taken a near-tie the other way, what follows is compared with the reference forced along.
    """
    logits, routes = expected
    differ = np.argwhere(found.chosen != routes.chosen)
    if len(differ):
        layer, token = differ[0]
        assert routes.margin[layer, token] < NEAR, (row, layer, token, routes.margin[layer, token])
        part = talk.of_rows([row])
        [logits], _ = golden.routed_logits(part.rows, part.prompted, [found.chosen])
    else:
        assert (found.overflow == routes.overflow).all(), (row, found.overflow, routes.overflow)
        scale = np.abs(routes.score).max() + 1
        assert np.abs(found.scores - routes.score).max() / scale < 1e-4
        _same_margins(found.margins, routes.margin, scale)
    return float(np.abs(found.logits - logits).max() / logits.std())


def _same_margins(found: np.ndarray, expected: np.ndarray, scale: float) -> None:
    assert (np.isinf(found) == np.isinf(expected)).all()
    finite = np.isfinite(expected)
    assert np.abs(found[finite] - expected[finite]).max(initial=0) / scale < 1e-4
