"""What a check compares: runs of the engine with answers of the reference, or with each other; figures only."""

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
    """One check, not judged yet.

    Attributes:
        skipped: whether tokens ran in fewer than all layers.
        cases: what was compared with the reference, as one batch; empty in other checks.
        at: positions whose logits were; empty: all.
    """

    name: str
    kind: Kind
    metrics: Metrics
    skipped: bool = False
    cases: tuple[Case, ...] = ()
    at: tuple[int, ...] = ()


@dataclass(frozen=True)
class Run:
    """What came of cases: per case float32 [length, vocab], and what routers decided, empty where there are none."""

    logits: Sequence[FloatArray]
    decided: Sequence[RowRoutes | RowPaths]


def absent(name: str, difference: str) -> Measurement:
    """A check that should have been made, and was not."""
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
    """Run cases through the engine and compare with what the reference answers to them."""
    return compared(name, kind, executor, cases, answered(answers), run(executor, cases, at=at), at=at)


def run(executor: Executor, cases: Sequence[Case], *, chunk: int = CHUNK, at: Sequence[int] = ()) -> Run:
    """The engine left to its own decisions."""
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
    """Logits, and where layers are routed the decisions.

    A row with another decision than the expected has other logits from there on, however exact the arithmetic: such
    rows run once more with the expected routes, so that numeric errors and decisions are told apart.

    Args:
        found: what these cases gave on this executor.
        last: compare only so many last positions; 0: as many as are expected.
        chunk: prompts went in pieces of this many tokens.
        at: positions that were wanted; empty: all.
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
    """The decisions to force, int64 or bool [R, tokens]; what a full layer made of one is not among them."""
    return np.where(row.decisions == TURNED_AWAY, -1, row.decisions)


def skips(executor: Executor, depth: Depth) -> bool:
    return len(depth.keep) < executor.manifest.model.layers


__all__ = ["Measurement", "Run", "absent", "answered", "compared", "replayed", "run", "skips", "wishes"]
