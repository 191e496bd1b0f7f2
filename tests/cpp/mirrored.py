"""The operations of a schedule on Python's KvCache and Executor, as tests/probes/probe_run.cpp runs them in C++."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError, RouteError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import CHUNK, Batch, EvenChunks
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kept import keep_first
from dynexport.runtime.execution.kv_cache import Mark
from dynexport.runtime.execution.mark import Saved

Array = np.ndarray
Json = dict[str, Any]


@dataclass
class Mirrored:
    """One schedule on a cache of Python's: what was run and what it gave, as the C++ program tells it.

    Attributes:
        operations: the operations, as the program reads them.
        told: their results, as the program prints them.
        logits: the logits of all of them, in order.
    """

    executor: Executor
    rows: int
    tokens: int
    record: bool = False
    room: int | None = None
    operations: list[Json] = field(default_factory=list)
    told: list[Json] = field(default_factory=list)
    logits: list[Array] = field(default_factory=list)
    marks: dict[str, Mark] = field(default_factory=dict)
    saved: dict[str, Saved] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache = self.executor.cache(self.rows, self.tokens, record=self.record, room=self.room)

    def run(self, op: str, **how: Any) -> Json:
        """Run an operation, keep its result, and return it."""
        told: Json = {}
        try:
            told["found"] = getattr(self, f"_{op}")(**how)
        except DynexportError as error:
            told["error"] = str(error)
            if isinstance(error, RouteError):
                told["route"] = True
        told["state"] = self.state()
        self.operations.append({"op": op, **how})
        self.told.append(told)
        return told

    def request(self, logits: Path) -> Json:
        """The schedule for the C++ program, which writes its logits to a file."""
        sizes = {"rows": self.rows, "tokens": self.tokens, "record": self.record, "room": self.room}
        return {**sizes, "logits": str(logits), "operations": self.operations}

    def state(self) -> Json:
        """What a cache tells of itself."""
        cache = self.cache
        steps = [len(log) for log in cache.logs] if cache.logs is not None else [0] * self.rows
        counts = {"lengths": cache.lengths, "overflow": cache.overflow}
        return {
            **{name: values.T.tolist() for name, values in counts.items()},
            "positions": cache.positions.tolist(),
            "steps": steps,
            "free": cache.free,
        }

    def _acquire(self, count: int) -> list[int]:
        return self.cache.acquire(count)

    def _release(self, row: int) -> None:
        self.cache.release(row)

    def _rewind(self, row: int) -> None:
        self.cache.rewind(row)

    def _move(self, row: int, target: int) -> None:
        self.cache.move(row, target)

    def _mark(self, row: int, name: str) -> None:
        self.marks[name] = self.cache.mark(row)

    def _truncate(self, row: int, mark: str) -> None:
        self.cache.truncate(row, self.marks[mark])

    def _copy_prefix(self, mark: str, target: int) -> None:
        self.cache.copy_prefix(self.marks[mark], target)

    def _save(self, row: int, mark: str, name: str) -> None:
        at = self.marks[mark]
        self.saved[name] = self.cache.save(row, at.lengths, at.position)

    def _restore(self, row: int, name: str) -> None:
        if row in range(self.rows) and self.cache.positions[row] == self.saved[name].first:
            self.cache.reserve(self.saved[name].last)  # the C++ cache grows by itself
        self.cache.restore(row, self.saved[name])

    def _decode(self, rows: list[int], tokens: list[int], depths: list[str]) -> Json:
        logits = self.executor.decode(self.cache, rows, tokens, self._depths(depths), lasting=False)
        return {"best": self._best(logits)}

    def _drafted(self, row: int, tokens: list[int], kept: int, depths: list[str]) -> Json:
        (depth,), mark = self._depths(depths), self.cache.mark(row)
        result = self.executor.run(self.cache, Batch([row], [tokens], "decode", depth, "all"))
        decisions = None if result.decisions is None else result.decisions[0]
        keep_first(self.executor, self.cache, mark, tokens[:kept], depth, decisions)
        return {"best": self._best(result.logits[0])}

    def _run(
        self,
        rows: list[int],
        tokens: list[list[int]],
        phase: Any,
        depths: list[str],
        wanted: Any = "last",
        forced: list[list[int]] | None = None,
        chunk: int = CHUNK,
        even: bool = False,
    ) -> Json:
        found = self._depths(depths)
        told = None
        if forced is not None:
            told = [self._wish(wish, len(ids)) for wish, ids in zip(forced, tokens, strict=False)]
        batch = Batch(
            rows,
            tokens,
            phase,
            found[0] if len(found) == 1 else found,
            wanted,
            told,  # type: ignore[arg-type]
            EvenChunks(chunk) if even else chunk,
        )
        result = self.executor.run(self.cache, batch)
        decisions = [_shown(made) for made in result.decisions or ()]
        best = [self._best(logits) for logits in result.logits]
        return {"best": best, "entries": result.entries.T.tolist(), "decisions": decisions}

    def _wish(self, wish: list[int], tokens: int) -> Array | None:
        """A row's forced decisions, [R, tokens], or None."""
        rows = self.executor.reader.rows
        return np.array(wish).reshape((rows, tokens) if rows else -1) if wish else None

    def _depths(self, names: Sequence[str]) -> list[Depth]:
        return [self.executor.bundle.depth(name) for name in names]

    def _best(self, logits: Array) -> list[int]:
        self.logits.append(logits.copy())
        return [int(token) for token in logits.argmax(axis=1)]


def _shown(made: Decisions) -> Json:
    """Decisions as the program prints them; JSON has no infinity."""
    margins = np.minimum(made.margins, np.float32(3e38))
    return {
        "tokens": made.ran.shape[1],
        "ran": made.ran.astype(int).ravel().tolist(),
        "choices": made.choices.ravel().tolist(),
        "scores": made.scores.ravel().tolist(),
        "margins": margins.ravel().tolist(),
        "overflow": made.overflow.tolist(),
    }


def compare(run: Callable[..., Any], schedules: list[Mirrored], home: Path) -> None:
    """Run schedules of one executor in C++ and compare everything that they give; logits to the last bit."""
    executor = schedules[0].executor
    files = [home / f"logits-{place}" for place in range(len(schedules))]
    request = {
        "bundle": str(executor.bundle.path),
        "threads": executor.threads,
        "schedules": [schedule.request(file) for schedule, file in zip(schedules, files, strict=True)],
    }
    ran = run("probe_run", stdin=json.dumps(request).encode())
    assert ran.returncode == 0, ran.stderr.decode()
    for schedule, file, found in zip(schedules, files, json.loads(ran.stdout), strict=True):
        for operation, its, expected in zip(schedule.operations, found, schedule.told, strict=True):
            assert its == expected, operation
        logits = [values.ravel() for values in schedule.logits]
        expected = np.concatenate([np.zeros(0, np.float32), *logits])
        np.testing.assert_array_equal(np.fromfile(file, np.float32), expected)


__all__ = ["Mirrored", "compare"]
