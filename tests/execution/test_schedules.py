"""Rows that come and go, in whatever company: each gives what it gives alone on a fresh cache.

A schedule is drawn at random: rows acquired, prompts in pieces, decode steps of some rows at depths of their own, rows
released, moved, begun with another one's prefix, cut back to a mark and continued.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from forms import CONTEXT, FORMS, executor_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynexport.runtime.bundle.manifest import Depth, Phase
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache, Mark

Array = np.ndarray
# float32 in another order of addition; logits are of the order of 1.
SAME = 5e-5
# Nearer to the other decision, rounding may decide.
NEAR = 1e-5


@dataclass(frozen=True)
class Told:
    """Tokens that a row was given in one batch, and what it gave.

    Attributes:
        logits: float32 [n, vocab].
    """

    tokens: list[int]
    phase: Phase
    depth: Depth
    logits: Array
    decisions: Decisions | None


@dataclass
class Row:
    """What a row of the cache has been told since it was empty, and its marks with how much that was then."""

    told: list[Told] = field(default_factory=list)
    marks: list[tuple[Mark, int]] = field(default_factory=list)


class Schedule:
    """One random run over a cache."""

    def __init__(self, executor: Executor, data: st.DataObject, rows: int) -> None:
        self.executor, self.data = executor, data
        self.cache = executor.cache(rows, CONTEXT, record=True, room=8)
        self.rows: dict[int, Row] = {}
        self.depths = [executor.manifest.full, *executor.manifest.depths]
        # In int8 caches a token attends to those of its own call before they are rounded, so calls are not cut.
        int8 = executor.manifest.caches[0].parts["key"].dtype == "int8"
        self.chunks = [1024] if int8 else [1, 2, 3, 1024]

    def run(self, moves: int) -> None:
        self.acquire()
        for _ in range(moves):
            able = [self.prompt, self.decode, self.decode, self.mark]
            able += [self.acquire] * (len(self.rows) < self.cache.rows)
            able += [self.release, self.move] if self.rows else []
            able += [self.truncate, self.copy] if any(row.marks for row in self.rows.values()) else []
            able[self.draw(st.integers(0, len(able) - 1))]()
            self.check_counts()

    def draw(self, values: st.SearchStrategy[Any]) -> Any:
        return self.data.draw(values)

    def some(self, most: int) -> dict[int, list[int]]:
        """Tokens for some rows, in any order: those that have room for so many."""
        able = [row for row in self.rows if self.cache.positions[row] + most <= CONTEXT]
        chosen = self.draw(st.lists(st.sampled_from(able), unique=True, min_size=1)) if able else []
        seed = np.random.default_rng(self.draw(st.integers(0, 99)))
        return {
            row: seed.integers(0, 80, 1 if most == 1 else self.draw(st.integers(1, most))).tolist() for row in chosen
        }

    def acquire(self) -> None:
        count = self.draw(st.integers(1, self.cache.rows - len(self.rows)))
        for row in self.cache.acquire(count):
            self.rows[row] = Row()

    def prompt(self) -> None:
        tokens = self.some(9)
        depth = self.executor.manifest.full
        self.told(tokens, "prompt", [depth] * len(tokens), chunk=self.draw(st.sampled_from(self.chunks)))

    def decode(self) -> None:
        tokens = {row: ids for row, ids in self.some(1).items() if self.rows[row].told}
        self.told(tokens, "decode", [self.draw(st.sampled_from(self.depths)) for _ in tokens])

    def told(self, tokens: dict[int, list[int]], phase: Phase, depths: list[Depth], **how: Any) -> None:
        if not tokens:
            return
        found = self.executor.run(self.cache, Batch([*tokens], [*tokens.values()], phase, depths, "all", **how))
        for place, (row, ids) in enumerate(tokens.items()):
            decisions = found.decisions[place] if found.decisions is not None else None
            self.rows[row].told.append(Told(ids, phase, depths[place], found.logits[place], decisions))

    def mark(self) -> None:
        if self.rows:
            row = self.draw(st.sampled_from([*self.rows]))
            self.rows[row].marks.append((self.cache.mark(row), len(self.rows[row].told)))

    def release(self) -> None:
        row = self.draw(st.sampled_from([*self.rows]))
        self.cache.release(row)
        check_alone(self.executor, self.rows.pop(row))

    def move(self) -> None:
        row = self.draw(st.sampled_from([*self.rows]))
        free = [target for target in range(self.cache.rows) if target not in self.rows]
        if free:
            target = self.draw(st.sampled_from(free))
            self.cache.move(row, target)
            self.rows[target] = Row(self.rows.pop(row).told)

    def marked(self) -> tuple[int, Mark, int]:
        row = self.draw(st.sampled_from([row for row in self.rows if self.rows[row].marks]))
        mark, told = self.draw(st.sampled_from(self.rows[row].marks))
        return row, mark, told

    def truncate(self) -> None:
        row, mark, told = self.marked()
        check_alone(self.executor, self.rows[row])
        self.cache.truncate(row, mark)
        mine = self.rows[row]
        self.rows[row] = Row(mine.told[:told], [other for other in mine.marks if other[1] <= told])

    def copy(self) -> None:
        row, mark, told = self.marked()
        empty = [target for target, its in self.rows.items() if not its.told]
        if empty:
            target = self.draw(st.sampled_from(empty))
            self.cache.copy_prefix(mark, target)
            self.rows[target] = Row(self.rows[row].told[:told])

    def check_counts(self) -> None:
        """Positions are the tokens told, entries those of the layers that ran; free rows are empty."""
        reader = self.executor.reader
        for number in range(self.cache.rows):
            row = self.rows.get(number, Row())
            assert self.cache.positions[number] == sum(len(told.tokens) for told in row.told)
            log = reader.joined(self.cache.logs[number])
            assert log.ran.shape[1] == self.cache.positions[number]
            assert self.cache.lengths[:, number].sum() == reader.layers_run(log).sum()
            np.testing.assert_array_equal(self.cache.overflow[:, number], log.overflow)


def check_alone(executor: Executor, row: Row) -> None:
    """The same tokens at the same phases and depths on a fresh cache of one row, batch by batch."""
    cache: KvCache = executor.full_cache(1, CONTEXT)
    for told in row.told:
        alone = executor.run(cache, Batch([0], [told.tokens], told.phase, told.depth, "all"))
        if told.decisions is not None:
            assert alone.decisions is not None
            differ = alone.decisions[0].choices != told.decisions.choices
            if differ.any():  # what follows from a near-tie is another text
                assert alone.decisions[0].margins[differ].min() < NEAR, "routes"
                return
            np.testing.assert_array_equal(alone.decisions[0].overflow, told.decisions.overflow)
        np.testing.assert_allclose(alone.logits[0], told.logits, atol=SAME)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_row_is_what_it_is_alone(form: str, data: st.DataObject) -> None:
    schedule = Schedule(executor_of(form), data, data.draw(st.integers(4, 6)))
    schedule.run(30)
    for row in schedule.rows.values():
        check_alone(schedule.executor, row)
