"""Caches of routed layers: their size, what is written into them, and what an error leaves of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, replace_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

CONTEXT = 32
ROUTED = (1, 3)
LAYERS = range(4)
PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4], list(range(60, 78))]
SECOND = [[6, 7, 8], [1], [2, 3], [30, 31, 32, 33]]
SLOTS = 7  # ceil(0.2 * 32)
GUARD = 256
SAME = 2e-5
BOTH = pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])

Executors = Callable[..., Executor]


@pytest.fixture(scope="module")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Executors:
    """By lowering, share of the context that the caches have room for, and what a full one does."""

    @cache
    def make(static: bool, capacity: float = 0.2, overflow: str = "residual", prefill: str = "causal") -> Executor:
        bundle = tmp_path_factory.mktemp("bundle") / "b"
        fields = {"cache": {"capacity": capacity, "overflow": overflow}, "prefill": prefill}
        convert(CONFORMANCE / "mod-router", bundle, fields=fields, static=static, max_length=CONTEXT, golden=False)
        return Executor(Bundle.open(bundle), threads=1)

    return make


def step(executor: Executor, cache: KvCache, tokens: list[int], *args: Any, **kwargs: Any) -> np.ndarray:
    return executor.step(cache, tokens, executor.bundle.depth(None), *args, **kwargs)


def talk(executor: Executor, cache: KvCache) -> list[np.ndarray]:
    """Two prompts a row and generated tokens after each; all logits."""
    found = executor.prefill(cache, PROMPTS, all_logits=True)
    found += [step(executor, cache, [token] * 4) for token in (1, 20, 40)]
    found += executor.prefill(cache, SECOND, all_logits=True, chunk=3)
    return [*found, *(step(executor, cache, [token] * 4) for token in (2, 50))]


def counts(cache: KvCache) -> list[list[int]]:
    return [cache.lengths.tolist(), cache.positions.tolist(), cache.overflow.tolist()]


def all_of(tokens: int, chosen: bool = True) -> np.ndarray:
    return np.full((len(ROUTED), tokens), chosen)


@BOTH
@pytest.mark.parametrize("capacity", [0.01, 0.2, 0.5, 1.0])
def test_routed_layers_have_a_share_of_the_slots_and_room_for_what_is_not_read(
    executor: Executors, static: bool, capacity: float
) -> None:
    run = executor(static, capacity)
    slots = math.ceil(capacity * CONTEXT)
    for wanted in (CONTEXT, 5):
        cache = run.full_cache(2, wanted)
        slack = slots if static else 1  # as many as a step on a filled cache may write at once
        for layer in LAYERS:
            expected = min(slots, wanted) + slack if layer in ROUTED else wanted
            assert cache.buffers[f"{layer}.key"].shape[2] == cache.buffers[f"{layer}.value"].shape[2] == expected


def guarded(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Put every buffer between two guards, and NaN into all that is not written yet; the memory with the guards."""
    memory = {}
    for name, buffer in cache.buffers.items():
        memory[name] = np.full(buffer.size + 2 * GUARD, np.nan if buffer.dtype == np.float32 else -77, buffer.dtype)
        view = memory[name][GUARD:-GUARD].reshape(buffer.shape)
        assert view.base is not None and view.flags.c_contiguous
        monkeypatch.setitem(cache.buffers, name, view)
    return memory


@BOTH
@pytest.mark.parametrize("prefill", ["causal", "topk"])
@pytest.mark.parametrize("capacity", [0.2, 1.0])
def test_nothing_is_written_out_of_range_and_nothing_read_that_was_not_written(
    executor: Executors, static: bool, prefill: str, capacity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = executor(static, capacity, prefill=prefill)
    expected = talk(run, run.full_cache(4, CONTEXT))
    cache = run.full_cache(4, CONTEXT)
    memory = guarded(cache, monkeypatch)
    found = talk(run, cache)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    for whole in memory.values():
        for guard in (whole[:GUARD], whole[-GUARD:]):
            np.testing.assert_array_equal(guard, np.full_like(guard, np.nan))
    assert cache.lengths[list(ROUTED)].max() <= math.ceil(capacity * CONTEXT)


@BOTH
def test_a_full_cache_is_left_as_it_is(executor: Executors, static: bool) -> None:
    """Tokens that find no room write behind its last entry only, and are counted."""
    run = executor(static)
    cache = run.full_cache(1, CONTEXT)
    run.prefill(cache, [list(range(12))], forced=[all_of(12)])
    assert cache.lengths[:, 0].tolist() == [12, SLOTS, 12, SLOTS] and cache.overflow[:, 0].tolist() == [5, 5]
    before = {name: buffer[:, :, :SLOTS].copy() for name, buffer in cache.buffers.items()}
    step(run, cache, [1], forced=all_of(1))
    run.prefill(cache, [[2, 3, 4]], forced=[all_of(3)])
    assert cache.lengths[:, 0].tolist() == [16, SLOTS, 16, SLOTS] and cache.overflow[:, 0].tolist() == [9, 9]
    for layer in ROUTED:
        for part in ("key", "value"):
            name = f"{layer}.{part}"
            np.testing.assert_array_equal(cache.buffers[name][:, :, :SLOTS], before[name])


@BOTH
def test_what_a_full_cache_means_for_the_logits(executor: Executors, static: bool) -> None:
    """A token that is turned away is a token that was not chosen."""
    run = executor(static)
    full, told = run.full_cache(1, CONTEXT), run.full_cache(1, CONTEXT)
    prompt, some = list(range(12)), all_of(12)
    some[:, SLOTS:] = False
    [found] = run.prefill(full, [prompt], forced=[all_of(12)], all_logits=True)
    [expected] = run.prefill(told, [prompt], forced=[some], all_logits=True)
    np.testing.assert_array_equal(found, expected)
    again = step(run, full, [1], forced=all_of(1)), step(run, told, [1], forced=all_of(1, False))
    np.testing.assert_array_equal(*again)
    assert not (told.overflow > 0).any()


@BOTH
def test_an_overflow_that_is_an_error_leaves_the_cache_as_it_was(executor: Executors, static: bool) -> None:
    run, other = executor(static, overflow="error"), executor(static)
    cache, expected = run.full_cache(2, CONTEXT, record=True), other.full_cache(2, CONTEXT)
    for each, state in ((run, cache), (other, expected)):
        each.prefill(state, [[4, 5, 6], list(range(SLOTS))], forced=[all_of(3), all_of(SLOTS)])
    before, logged = counts(cache), [len(log) for log in cache.logs]
    one = np.ones((2, 2), bool)
    for attempt in (
        lambda: step(run, cache, [1, 1], forced=one),
        lambda: run.prefill(cache, [[1, 2, 3, 4, 5], [1]], forced=[all_of(5), all_of(1)]),
        lambda: run.prefill(cache, [[1, 2, 3], [1]], forced=[all_of(3), all_of(1)]),
        lambda: run.prefill(cache, [[1] * 6, [1]], forced=[all_of(6), all_of(1)], chunk=2),
    ):
        with pytest.raises(DynexportError, match=r"^layer 1: row \d: all 7 entries of its cache are used") as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert counts(cache) == before and [len(log) for log in cache.logs] == logged
    for wish in (np.array([[True, False]] * 2), np.zeros((2, 2), bool)):
        found = step(run, cache, [8, 9], forced=wish)
        np.testing.assert_array_equal(found, step(other, expected, [8, 9], forced=wish))


@BOTH
def test_a_row_that_has_ended_leaves_no_entry_and_disturbs_none(executor: Executors, static: bool) -> None:
    run = executor(static, 1.0)
    cache, alone = run.full_cache(3, 10, record=True), run.full_cache(1, 10)
    run.prefill(cache, [[1, 2, 3], [4], [5, 6, 7, 8]])
    run.prefill(alone, [[1, 2, 3]])
    live = np.array([True, False, False])
    ended = cache.lengths[:, 1:].copy()
    for token in range(7):
        found = step(run, cache, [token, 80, 81], live, forced=np.ones((2, 3), bool))
        np.testing.assert_allclose(found[0], step(run, alone, [token], forced=all_of(1))[0], atol=SAME)
    np.testing.assert_array_equal(cache.lengths[:, 1:], ended)
    assert cache.positions.tolist() == [10, 1, 4] and not cache.overflow.any()
    assert [sum(part.ran.shape[1] for part in log) for log in cache.logs] == [10, 1, 4]
    assert cache.lengths[1, 0] == alone.lengths[1, 0]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Executor]:
    """The embedding of token 5 is no number."""

    @cache
    def make(static: bool) -> Executor:
        bundle = tmp_path_factory.mktemp("broken") / "b"
        convert(CONFORMANCE / "mod-router", bundle, static=static, max_length=CONTEXT, golden=False)
        graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
        table = next(tensor for tensor in graph.initializer if tensor.name == "model.embed_tokens.weight")
        offset = int(next(entry.value for entry in table.external_data if entry.key == "offset"))
        data = np.fromfile(bundle / "model.data", np.float32)
        data[offset // 4 :][5 * table.dims[1] : 6 * table.dims[1]] = np.nan
        replace_file(bundle, "model.data", data.tobytes())
        return Executor(Bundle.open(bundle), threads=1)

    return make


@BOTH
def test_a_score_that_is_no_number_is_refused(broken: Callable[[bool], Executor], static: bool) -> None:
    run = broken(static)
    cache = run.full_cache(2, CONTEXT)
    message = r"^layer 1: row 1, token 0: expected a router score, found NaN; .* dynexport verify"
    with pytest.raises(DynexportError, match=message):
        run.prefill(cache, [[1, 2, 3, 4], [5, 1, 2]])
    assert not cache.positions.any() and not cache.lengths.any()
    run.prefill(cache, [[1, 2, 3, 4], [1, 2]])
    before = counts(cache)
    with pytest.raises(DynexportError, match=message):
        step(run, cache, [1, 5])
    assert counts(cache) == before
    # Of a row that has ended nobody asks what it scores.
    step(run, cache, [1, 5], np.array([True, False]))
