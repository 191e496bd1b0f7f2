"""Wrong calls of a cache and of the executor: each is told in one line, and leaves every count as it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from forms import CONTEXT, executor_of

import dynexport.runtime as runtime
from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.engines.engine import Caches
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

ROWS = 4


class At:
    """A cache of four rows: 0 and 1 hold tokens, 2 is acquired and empty, 3 is free; and marks."""

    def __init__(self, form: str = "skip") -> None:
        self.run = executor_of(form)
        self.full = self.run.manifest.full
        self.cache = self.run.cache(ROWS, CONTEXT, record=True)
        self.cache.acquire(3)
        self.earlier = self.cache.mark(0)
        self.cache.rewind(0)  # its tenant is another one now
        self.told([0, 1], [[1, 2, 3], [4, 5]])
        self.mine, self.other = self.cache.mark(0), self.cache.mark(1)
        self.told([0], [[6, 7]])
        self.beyond = self.cache.mark(0)
        self.cache.truncate(0, self.mine)

    def told(self, rows: Any, tokens: Any, phase: Any = "prompt", depth: Any = None, **more: Any) -> Any:
        depth = self.full if depth is None else depth
        return self.run.run(self.cache, Batch(rows, tokens, phase, depth, **more))

    def grown(self) -> KvCache:
        """The cache, after row 0 went on where it was cut back, beyond where it had been."""
        self.told([0], [[9, 9, 9, 9]])
        return self.cache

    def state(self) -> list[Any]:
        cache = self.cache
        assert cache.logs is not None
        counts = [cache.lengths.tolist(), cache.positions.tolist(), cache.overflow.tolist()]
        return [*counts, [len(log) for log in cache.logs], list(cache._free), [*cache._texts._tenants]]


WRONG: dict[str, tuple[Callable[[At], Any], str]] = {
    "acquire beyond": (lambda at: at.cache.acquire(2), "cache: expected 2 free of 4 rows, found 1; release one"),
    "acquire none": (lambda at: at.cache.acquire(0), "rows: expected at least 1, found 0"),
    "acquire text": (lambda at: at.cache.acquire("1"), "rows: expected at least 1, found '1'"),
    "release a free row": (
        lambda at: at.cache.release(3),
        "cache: row 3: expected one that is acquired, found it free",
    ),
    "release beyond": (lambda at: at.cache.release(4), "row: expected 0..3, found 4"),
    "release before": (lambda at: at.cache.release(-1), "row: expected 0..3, found -1"),
    "release none": (lambda at: at.cache.release(None), "row: expected 0..3, found None"),
    "release true": (lambda at: at.cache.release(True), "row: expected 0..3, found True"),
    "rewind a free row": (lambda at: at.cache.rewind(3), "cache: row 3: expected one that is acquired"),
    "mark a free row": (lambda at: at.cache.mark(3), "cache: row 3: expected one that is acquired"),
    "mark a part": (lambda at: at.cache.mark(1.0), "row: expected 0..3, found 1.0"),
    "truncate beyond": (
        lambda at: at.cache.truncate(0, at.beyond),
        "cache: row 0: expected a mark within its 3 tokens",
    ),
    "truncate another row": (lambda at: at.cache.truncate(0, at.other), "cache: row 0: expected a mark of its own"),
    "truncate to an earlier text": (
        lambda at: at.cache.truncate(0, at.earlier),
        "cache: row 0: expected a mark of this text, found one of an earlier text",
    ),
    "truncate to none": (lambda at: at.cache.truncate(0, None), "mark: expected one of KvCache.mark, found None"),
    "truncate to a number": (lambda at: at.cache.truncate(0, 3), "mark: expected one of KvCache.mark, found 3"),
    "truncate a free row": (lambda at: at.cache.truncate(3, at.mine), "cache: row 3: expected one that is acquired"),
    "copy beyond": (lambda at: at.cache.copy_prefix(at.beyond, 2), "cache: row 0: expected a mark within its 3 tokens"),
    "copy of an earlier text": (
        lambda at: at.cache.copy_prefix(at.earlier, 2),
        "cache: row 0: expected a mark of this",
    ),
    "copy into a full row": (
        lambda at: at.cache.copy_prefix(at.mine, 1),
        "cache: row 1: expected an empty row to copy",
    ),
    "copy into itself": (lambda at: at.cache.copy_prefix(at.mine, 0), "cache: row 0: expected an empty row to copy to"),
    "copy into a free row": (
        lambda at: at.cache.copy_prefix(at.mine, 3),
        "cache: row 3: expected one that is acquired",
    ),
    "copy of another cache": (lambda at: at.cache.copy_prefix(At().mine, 2), "cache: row 0: expected a mark of this"),
    "copy of none": (lambda at: at.cache.copy_prefix(None, 2), "mark: expected one of KvCache.mark, found None"),
    "copy into text": (lambda at: at.cache.copy_prefix(at.mine, "2"), "row: expected 0..3, found '2'"),
    "move onto a row": (lambda at: at.cache.move(0, 2), "cache: row 2: expected a free row to move to, found it acq"),
    "move onto itself": (lambda at: at.cache.move(0, 0), "cache: row 0: expected a free row to move to, found it acq"),
    "move a free row": (lambda at: at.cache.move(3, 3), "cache: row 3: expected one that is acquired, found it free"),
    "move beyond": (lambda at: at.cache.move(0, 9), "row: expected 0..3, found 9"),
    "move to none": (lambda at: at.cache.move(0, None), "row: expected 0..3, found None"),
    "run a free row": (lambda at: at.told([0, 3], [[1], [2]]), "cache: row 3: expected one that is acquired"),
    "run a row twice": (
        lambda at: at.told([0, 0], [[1], [2]]),
        "rows: expected each row of a batch once, found [0, 0]",
    ),
    "run a row beyond": (lambda at: at.told([4], [[1]]), "row: expected 0..3, found 4"),
    "run rows of none": (lambda at: at.told(None, [[1]]), "rows: expected a list of"),
    "run one row": (lambda at: at.told(0, [[1]]), "rows: expected a list of"),
    "run too few tokens": (lambda at: at.told([0, 1], [[1]]), "prompts: expected 2, one for each row, found 1"),
    "run tokens of none": (lambda at: at.told([0], None), "prompts: expected a list of 1, one a row, found None"),
    "run no batch": (lambda at: at.run.run(at.cache, None), "batch: expected a Batch, found None"),
    "run another phase": (lambda at: at.told([0], [[1]], "answer"), "phase: expected prompt or decode, found 'answer'"),
    "run phase none": (lambda at: at.told([0], [[1]], None), "phase: expected prompt or decode, found None"),
    "run a ratio": (lambda at: at.told([0], [[1]], depth=2), "depth: expected one of Bundle.depth, found 2"),
    "run ratios": (lambda at: at.told([0], [[1]], depth=[2]), "depth: expected one of Bundle.depth, found 2"),
    "run too few depths": (lambda at: at.told([0, 1], [[1], [2]], depth=[at.full]), "depth: expected 2, one for each"),
    "run other logits": (lambda at: at.told([0], [[1]], logits="some"), "logits: expected last, all or places, found"),
    "run logits of none": (lambda at: at.told([0], [[1]], logits=None), "logits_at: expected a list of 1"),
    "run no chunk": (lambda at: at.told([0], [[1]], chunk=0), "chunk: expected at least 1, found 0"),
    "run forced": (lambda at: at.told([0], [[1]], forced=[np.ones((1, 1))]), "forced: expected None, as"),
    "run beyond the context": (
        lambda at: at.told([1, 0], [[1], [1] * 38], "decode"),
        "tokens: expected at most 37 tokens to fit the context of 40, found 38",
    ),
    "run with a cache of none": (lambda at: at.run.run(None, Batch([0], [[1]], "prompt", at.full)), "cache: expected"),
    "decode a free row": (
        lambda at: at.run.decode(at.cache, [2, 3], [1, 1], [at.full] * 2),
        "cache: row 3: expected one",
    ),
    "decode a row twice": (
        lambda at: at.run.decode(at.cache, [1, 1], [1, 1], [at.full] * 2),
        "rows: expected each row",
    ),
    "decode too few": (
        lambda at: at.run.decode(at.cache, [0, 1], [1], [at.full] * 2),
        "tokens: expected 2, one for each",
    ),
    "decode no row": (lambda at: at.run.decode(at.cache, [], [], []), "rows: expected at least one, found none"),
    "decode a ratio": (
        lambda at: at.run.decode(at.cache, [0], [1], [2]),
        "depth: expected one of Bundle.depth, found 2",
    ),
    "decode text": (lambda at: at.run.decode(at.cache, [0], ["a"], [at.full]), "tokens: expected token ids 0..88"),
    "decode with a cache of none": (lambda at: at.run.decode(None, [0], [1], [at.full]), "cache: expected one of"),
}


@pytest.fixture(scope="module")
def at() -> At:
    return At()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_told_and_changes_nothing(at: At, name: str) -> None:
    call, begins = WRONG[name]
    before = at.state()
    with pytest.raises(DynexportError) as told:
        call(at)
    assert str(told.value).startswith(begins) and "\n" not in str(told.value), str(told.value)
    assert at.state() == before


def test_a_mark_that_was_cut_off_stays_none_when_the_row_has_grown_past_it() -> None:
    """Another text stands there now; marks up to the cut are still good, as are later ones."""
    at = At()
    cache = at.grown()
    later = cache.mark(0)
    for wrong in (lambda: cache.truncate(0, at.beyond), lambda: cache.copy_prefix(at.beyond, 2)):
        with pytest.raises(
            DynexportError, match="expected a mark within its 7 tokens, found one after 5; the row was truncated"
        ):
            wrong()
    cache.truncate(0, later)
    cache.copy_prefix(at.mine, 2)
    cache.truncate(0, at.mine)
    assert cache.positions.tolist() == [3, 2, 3, 0]
    with pytest.raises(DynexportError, match="the row was truncated since"):
        cache.truncate(0, later)


def test_rows_released_twice_and_used_after_it() -> None:
    at = At()
    at.cache.release(1)
    before = at.state()
    for wrong in (
        lambda: at.cache.release(1),
        lambda: at.told([1], [[1]], "decode"),
        lambda: at.cache.copy_prefix(at.other, 2),
        lambda: at.cache.truncate(1, at.other),
    ):
        with pytest.raises(DynexportError, match=r"^cache: row 1: expected one that is acquired, found it free$"):
            wrong()
    assert at.state() == before and at.cache.acquire(2) == [1, 3] and not at.cache.positions[[1, 3]].any()
    with pytest.raises(DynexportError, match="expected a mark of this text, found one of an earlier text"):
        at.cache.copy_prefix(at.other, 2)


def test_a_prefix_that_top_k_decided_is_not_copied(tmp_path: Path) -> None:
    convert(CONFORMANCE / "mod-topk", tmp_path / "b", golden=False, max_length=CONTEXT)
    run = Executor(Bundle.open(tmp_path / "b"), threads=1)
    cache = run.full_cache(2, CONTEXT)
    run.run(cache, Batch([0], [[1, 2, 3]], "prompt", run.manifest.full))
    mark = cache.mark(0)
    with pytest.raises(
        DynexportError,
        match=r"^cache: expected a prefix that does not depend on the tokens after it, .* \(top-k, .*\); run .* again$",
    ):
        cache.copy_prefix(mark, 1)
    assert cache.positions.tolist() == [3, 0]
    run.run(cache, Batch([0], [[4]], "decode", run.manifest.full))
    cache.truncate(0, mark)
    assert cache.positions.tolist() == [3, 0]


# What fails in the middle of a batch


FAILURES: list[tuple[type[BaseException], str]] = [
    (DynexportError, "engine"),
    (KeyboardInterrupt, "stop"),
    (MemoryError, "memory"),
]


@pytest.mark.parametrize("form", ["skip", "mod-padded", "radial-layer", "radial-single-step"])
@pytest.mark.parametrize(("error", "text"), FAILURES, ids=[text for _, text in FAILURES])
def test_a_call_that_fails_takes_those_before_it_along(
    form: str, error: type[BaseException], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows in pieces of two tokens: the third call with caches fails, after others were counted."""
    at, fresh = At(form), At(form)
    batch = Batch([1, 2, 0], [[5, 6, 7, 8, 9], [3, 4, 2], [1]], "prompt", at.full, "all", chunk=2)
    program: Any = at.run.program("prompt", at.full)
    before, calls, run = at.state(), 0, type(program).run

    def failing(self: Any, cache: KvCache, call: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error(text)
        return run(self, cache, call)

    with monkeypatch.context() as patch:
        patch.setattr(type(program), "run", failing)
        with pytest.raises(error):
            at.run.run(at.cache, batch)
    assert calls == 3 and at.state() == before
    found, expected = at.run.run(at.cache, batch), fresh.run.run(fresh.cache, batch)
    for own, other in zip(found.logits, expected.logits, strict=True):
        np.testing.assert_array_equal(own, other)
    assert at.state()[:-1] == fresh.state()[:-1]  # other tenants


# One owner


def test_nothing_but_the_cache_writes_how_much_of_it_is_in_use() -> None:
    """Neither an assignment nor an array method that changes in place, anywhere in the runtime or the exporter."""
    home = Path(runtime.__file__).parent
    writes = re.compile(
        r"\.(lengths|positions|overflow)(\[[^\]=]*\])*\s*([-+*/|&^]|//|<<|>>)?=(?!=)"
        r"|\.(lengths|positions|overflow)(\[[^\]=]*\])*\.(fill|put|sort|resize|itemset|partition)\("
        r"|out=[\w.]*\.(lengths|positions|overflow)"
    )
    assert writes.search("cache.lengths[:, rows] += entries") and not writes.search("if cache.positions[row] == 3:")
    found = {
        f"{path.relative_to(home.parent)}: {line.strip()}"
        for part in (home, *(home.parent / "exporter" / room for room in ("parity", "trace", "profile", "cli")))
        for path in part.rglob("*.py")
        for line in path.read_text().splitlines()
        if writes.search(line)
    }
    owner = "runtime/execution/kv_cache.py"
    assert any(line.startswith(owner) for line in found)
    assert {line for line in found if not line.startswith(owner)} == set()


def test_views_of_a_call_are_its_rows(at: At) -> None:
    views = Caches(at.cache.buffers, slice(1, 3)).views(["0.key"])
    assert views["0.key"].base is not None and views["0.key"].shape[0] == 2
