"""Comparison of engine runs with the reference or with each other; thresholds.py judges the metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dynexport.exporter.parity.cases import Forced, replay, routes
from dynexport.exporter.parity.metrics import FloatArray, Metrics, compare_logits, compare_routes
from dynexport.exporter.parity.thresholds import Kind
from dynexport.exporter.reference import Answer, Case, RowPaths, RowRoutes
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import CHUNK
from dynexport.runtime.execution.decisions import TURNED_AWAY
from dynexport.runtime.execution.executor import Executor

_ROUTES_OF: dict[Kind, Kind] = {"reference": "routes", "arithmetic": "arithmetic_routes"}


@dataclass(frozen=True)
class Measurement:
    """A check's metrics before they are judged.

    Attributes:
        name: name of the check.
        kind: limits that apply.
        metrics: measured values.
        skipped: whether tokens skipped layers.
        cases: the batch that was compared with the reference; empty for other checks.
        at: positions whose logits were compared; empty means all.
    """

    name: str
    kind: Kind
    metrics: Metrics
    skipped: bool = False
    cases: tuple[Case, ...] = ()
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """Result of running cases.

    Attributes:
        logits: per case float32 [length, vocab].
        decided: per case the routing decisions; empty for a bundle without routers.
    """

    logits: Sequence[FloatArray]
    decided: Sequence[RowRoutes | RowPaths]


def absent(name: str, difference: str) -> Measurement:
    """Return a failed check in place of one that could not be made."""
    return Measurement(name, "exact", {"identical": False, "differences": [difference]})


def replayed(
    name: str,
    executor: Executor,
    cases: Sequence[Case],
    answers: Sequence[Answer],
    *,
    at: tuple[int, ...] = (),
    kind: Kind = "reference",
) -> list[Measurement]:
    """Run cases on the engine and compare them with the reference's answers."""
    return compared(name, kind, executor, cases, answered(answers), run(executor, cases, at=at), at=at)


def run(executor: Executor, cases: Sequence[Case], *, chunk: int = CHUNK, at: Sequence[int] = ()) -> Run:
    """Run cases on the engine with its own routing decisions."""
    cache = executor.full_cache(len(cases), max(len(case.tokens) for case in cases), record=True)
    return Run(replay(executor, cases, cache=cache, chunk=chunk, at=at), routes(cache))


def answered(answers: Sequence[Answer]) -> Run:
    return Run([row.logits for row in answers], [row.routes for row in answers if row.routes is not None])


def compared(
    name: str,
    kind: Kind,
    executor: Executor,
    cases: Sequence[Case],
    expected: Run,
    found: Run,
    *,
    last: int = 0,
    chunk: int = CHUNK,
    at: tuple[int, ...] = (),
) -> list[Measurement]:
    """Compare logits, and routing decisions where the bundle has routers.

    After a different decision, a row's logits differ even with exact arithmetic. Such a row runs once more with the
    expected routes, so that numeric errors are separated from routing differences.

    Args:
        name: name of the check.
        kind: limits that apply.
        executor: runs the bundle.
        cases: the rows that were run.
        expected: the result to compare with.
        found: the result of ``cases`` on ``executor``.
        last: number of last positions to compare; 0 means all that are expected.
        chunk: tokens per prefill chunk of ``found``.
        at: positions whose logits were requested; empty means all.

    Returns:
        The comparison of logits, after that of decisions where there are some.
    """
    skipped = skips(executor, cases[0].depth)
    logits, measured = found.logits, []
    if expected.decided:
        told, decided = expected.decided, found.decided
        routes_kind = _ROUTES_OF.get(kind, "own_routes")
        measured.append(Measurement(f"routes/{name}", routes_kind, compare_routes(told, decided), skipped))
        differ = [bool((a.decisions != b.decisions).any()) for a, b in zip(told, decided, strict=True)]
        if any(differ):
            again = replay(executor, cases, chunk=chunk, forced=[wishes(row) for row in told], at=at)
            logits = [other if flipped else own for own, other, flipped in zip(logits, again, differ, strict=True)]
    wanted = [row[-last:] for row in expected.logits]
    candidate = [row[-len(like) :] for row, like in zip(logits, wanted, strict=True)]
    there = tuple(cases) if kind == "reference" else ()
    return [*measured, Measurement(name, kind, compare_logits(wanted, candidate), skipped, there, at)]


def wishes(row: RowRoutes | RowPaths) -> Forced:
    """Return the decisions to force, int64 [R, tokens]; -1, the router decides, where the layer was full."""
    return np.where(row.decisions == TURNED_AWAY, -1, row.decisions)


def skips(executor: Executor, depth: Depth) -> bool:
    return len(depth.keep) < executor.manifest.model.layers


__all__ = ["Measurement", "Run", "absent", "answered", "compared", "replayed", "run", "skips", "wishes"]
