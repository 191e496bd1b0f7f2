"""Which rows go together in a call: those side by side, with few between them that take no part, none of them full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from forms import CONTEXT, executor_of

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.execution import calls
from dynexport.runtime.execution.batch import Batch, Call, CallResult
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

ROWS = 12


def ranges(executor: Executor, cache: KvCache, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows of every call that a batch came to."""
    program: Any = executor.program(batch.phase, executor.manifest.full)
    found, run = [], type(program).run

    def watched(self: Any, cache: KvCache, call: Call) -> CallResult:
        found.append((call.rows.start, call.rows.stop))
        return run(self, cache, call)

    with monkeypatch.context() as patch:
        patch.setattr(type(program), "run", watched)
        executor.run(cache, batch)
    return found


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([0, 1, 2], [(0, 3)]),
        ([2, 0, 1], [(0, 3)]),
        ([0, 3], [(0, 4)]),  # two between
        ([0, 4], [(0, 1), (4, 5)]),  # three
        ([0, 3, 6, 8], [(0, 9)]),
        ([0, 3, 7], [(0, 4), (7, 8)]),
        ([7], [(7, 8)]),
    ],
)
def test_up_to_two_idle_rows_between_two_are_computed_along(
    rows: list[int], expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their entries stay as they are, to the last bit."""
    assert calls._MOST_IDLE == 2
    executor = executor_of("dense")
    cache = executor.full_cache(ROWS, CONTEXT)
    executor.prefill(cache, [[row + 1] * 3 for row in range(ROWS)])
    before, idle = {name: part.copy() for name, part in cache.buffers.items()}, [*{*range(ROWS)} - {*rows}]
    batch = Batch(rows, [[9]] * len(rows), "decode", executor.manifest.full)
    assert ranges(executor, cache, batch, monkeypatch) == expected
    for name, part in cache.buffers.items():
        np.testing.assert_array_equal(part[idle][:, :, :3], before[name][idle][:, :, :3])
    assert cache.lengths[0].tolist() == [3 + (row in rows) for row in range(ROWS)]


def test_a_full_row_is_never_computed_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call would write over its last entry."""
    executor = executor_of("dense")
    cache = executor.full_cache(3, 6)
    executor.prefill(cache, [[1], [2] * 6, [3]])
    before = {name: part[1].copy() for name, part in cache.buffers.items()}
    batch = Batch([0, 2], [[4], [5]], "decode", executor.manifest.full)
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 1), (2, 3)]
    for name, part in cache.buffers.items():
        np.testing.assert_array_equal(part[1], before[name])


def test_prompts_go_together_on_empty_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty rows between them are computed along, whatever their number; those that hold entries are not."""
    executor = executor_of("dense")
    cache, full = executor.full_cache(ROWS, CONTEXT), executor.manifest.full
    batch = Batch([0, 11], [[1, 2], [3, 4]], "prompt", full)
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 12)]
    cache.rewind(0)
    batch = Batch([0, 10, 11], [[1, 2], [3, 4], [5]], "prompt", full)
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 11), (11, 12)]
    batch = Batch([9], [[1, 2, 3, 4, 5]], "prompt", full, chunk=2)
    assert ranges(executor, cache, batch, monkeypatch) == [(9, 10)] * 3


def test_short_texts_share_a_call_where_attention_takes_ragged_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their caches hold; a row whose padding would not fit its slots runs alone, and its entries stay."""
    executor = executor_of("skip-plugins")
    assert executor.limits.together == "always" and executor_of("skip").limits.together == "empty"
    full, tokens = executor.manifest.full, [[9, 8, 7], [6], [5, 4, 3, 2]]
    cache, alone = (executor.full_cache(5, 12) for _ in range(2))
    for each in (cache, alone):
        executor.prefill(each, [[1, 2], [3] * 5, [4] * 9, [5] * 10, [6]])
    batch = Batch([0, 1, 4], tokens, "decode", full, "all")
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 2), (4, 5)]  # four tokens do not fit rows 2 and 3
    assert ranges(executor, cache, Batch([0, 2], [[1, 2], [3, 4]], "decode", full), monkeypatch) == [(0, 3)]
    assert ranges(executor, cache, Batch([0, 3], [[1, 2, 3], [4, 5]], "decode", full), monkeypatch) == [(0, 1), (3, 4)]
    for row, ids in zip((0, 1, 4), tokens, strict=True):
        executor.run(alone, Batch([row], [ids], "decode", full))
    for row, ids in ((0, [1, 2]), (2, [3, 4]), (0, [1, 2, 3]), (3, [4, 5])):
        executor.run(alone, Batch([row], [ids], "decode", full))
    assert np.array_equal(cache.lengths, alone.lengths)
    for name, part in cache.buffers.items():
        for row, length in enumerate(cache.lengths[int(name.partition(".")[0])]):
            np.testing.assert_allclose(part[row, :, :length], alone.buffers[name][row, :, :length], atol=1e-5)


@pytest.mark.parametrize("case", ["early-exit-prompt-exit", "loop-body", "mod-router", "loop-exit-compute"])
def test_rows_may_share_a_call_where_attention_takes_ragged_rows_and_nothing_routes(case: str, tmp_path: Path) -> None:
    manifest = convert(CONFORMANCE / case, tmp_path / "bundle", plugins=True, golden=False).manifest
    assert manifest.limits.together == ("always" if manifest.routing is None else "empty")


def test_long_texts_of_ragged_rows_run_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding them would compute more than it saves to read."""
    monkeypatch.setattr(calls, "_SHORT", 3)
    executor = executor_of("skip-plugins")
    cache = executor.full_cache(2, CONTEXT)
    executor.prefill(cache, [[1], [2]])
    batch = Batch([0, 1], [[1, 2, 3, 4], [5]], "prompt", executor.manifest.full)
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 1), (1, 2)]


def test_ragged_rows_of_a_set_of_graphs_are_one_call_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_of("radial-step")
    cache = executor.full_cache(4, CONTEXT)
    executor.prefill(cache, [[1]] * 4)
    batch = Batch([3, 1], [[1, 2, 3], []], "decode", executor.manifest.full)
    assert ranges(executor, cache, batch, monkeypatch) == [(3, 4)]
    batch = Batch([3, 0], [[1, 2, 3], [4]], "prompt", executor.manifest.full, chunk=2)
    assert ranges(executor, cache, batch, monkeypatch) == [(0, 4), (3, 4)]


@pytest.mark.parametrize("form", ["dense", "skip-tensorrt", "mod", "radial-step", "radial-decode-graph"])
def test_a_batch_may_ask_for_no_logits(form: str) -> None:
    """As a server does for all chunks of a prompt but the last: the head is not computed."""
    executor = executor_of(form)
    nothing = [np.zeros(0, np.int64)] * 2
    caches = [executor.full_cache(2, CONTEXT) for _ in range(2)]
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    found = executor.run(caches[0], Batch([0, 1], prompts, "prompt", executor.manifest.full, nothing, chunk=4))
    executor.run(caches[1], Batch([0, 1], prompts, "prompt", executor.manifest.full, chunk=4))
    assert [logits.shape for logits in found.logits] == [(0, executor.manifest.model.vocab_size)] * 2
    first, second = (executor.decode(cache, [0, 1], [8, 9], [executor.manifest.full] * 2) for cache in caches)
    np.testing.assert_allclose(first, second, atol=1e-5)
