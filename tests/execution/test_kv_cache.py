"""Caches are written where they lie: a step adds its entries, and touches nothing else of them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.engines.engine import Caches, HostMemory
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor

LAYERS, KEPT = range(8), (0, 2, 4, 7)


def test_a_step_adds_one_entry_in_the_kept_layers_and_changes_no_other_byte(executor: Executor) -> None:
    cache = executor.full_cache(2, 12)
    for buffer in cache.buffers.values():
        buffer[...] = 7
    executor.prefill(cache, [[1, 2, 3], [4, 5, 6]])
    before = {name: buffer.copy() for name, buffer in cache.buffers.items()}
    executor.step(cache, [7, 8], executor.bundle.depth(2))
    for name, buffer in cache.buffers.items():
        changed = np.unique(np.nonzero(buffer != before[name])[2 if buffer.ndim == 4 else 1])
        assert changed.tolist() == ([3] if int(name.split(".")[0]) in KEPT else []), name
    assert [cache.lengths[layer].tolist() for layer in LAYERS] == [[4, 4] if i in KEPT else [3, 3] for i in LAYERS]


def test_buffers_are_those_that_the_engine_writes(executor: Executor) -> None:
    cache = executor.full_cache(1, 12)
    executor.prefill(cache, [[1, 2, 3]])
    executor.step(cache, [4], executor.bundle.depth(2))
    (engine,) = executor._engines.values()
    (bound,) = engine._bound.values()
    binding = list(bound.values())[-1]
    addresses = {value.data_ptr() for value in binding._binding.get_outputs()}
    assert {buffer.ctypes.data for buffer in cache.buffers.values()} <= addresses


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_token_commits_the_pages_of_its_entries_and_not_those_of_its_row() -> None:
    def resident() -> int:
        return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10

    buffer = HostMemory().allocate((8, 4, 8192, 64), np.float32)
    before = resident()
    buffer[:, :, 0] = 1
    assert resident() - before < 4 << 20
    assert not buffer[:, :, 1:].any()


def for_context(bundle: Bundle, tokens: int) -> Executor:
    """Of the same model, as if it were for so long a context."""
    model = bundle.manifest.model.model_copy(update={"max_length": tokens})
    return Executor(Bundle(bundle.path, bundle.manifest.model_copy(update={"model": model})), threads=1)


def test_a_step_does_not_touch_the_memory_of_unused_slots(bundle: Bundle) -> None:
    """Untouched pages take no memory: copying the caches, even onto themselves, would make them take it all."""
    executor = for_context(bundle, 1 << 20)
    cache = executor.full_cache(1, 1 << 20)
    size = sum(buffer.nbytes for buffer in cache.buffers.values())
    executor.prefill(executor.full_cache(1, 4), [[1]])
    peak_before = _reset_peak_memory()
    executor.prefill(cache, [[1, 2, 3]])
    for ratio in (2, 1):
        executor.step(cache, [4], executor.bundle.depth(ratio))
    # Huge pages are 2 MB, and each buffer's two heads begin in pages of their own.
    assert _status("VmHWM") - peak_before < size / 4
    assert size >= 1 << 30


def test_a_cache_for_a_long_context_begins_small(bundle: Bundle, executor: Executor) -> None:
    long = for_context(bundle, 1 << 40)
    cache = long.full_cache(1, 1 << 40, room=8)
    assert {buffer.shape[2] for buffer in cache.buffers.values()} == {8}
    long.prefill(cache, [range(8)])
    first, used = cache.buffers, {name: buffer.copy() for name, buffer in cache.buffers.items()}
    cache.reserve(8)
    assert cache.buffers is first
    for tokens, room in ((9, 16), (17, 32), (100, 100)):
        cache.reserve(tokens)
        assert {buffer.shape[2] for buffer in cache.buffers.values()} == {room}
        for name, buffer in cache.buffers.items():
            assert (buffer[:, :, :8] == used[name]).all() and not buffer[:, :, 8:].any()
    small = executor.cache(2, 12, room=8)
    small.reserve(13)  # a row that has ended may be full
    assert small.buffers["0.key"].shape[2] == 12
    with pytest.raises(DynexportError, match="more than there is"):
        cache.reserve(1 << 40)
    assert cache.buffers["0.key"].shape[2] == 100


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _reset_peak_memory() -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("waits for a kernel that lets a process reset its peak memory")
    return _status("VmHWM")


def test_a_call_s_rows_are_the_same_memory(executor: Executor) -> None:
    cache = executor.full_cache(3, 4)
    views = Caches(cache.buffers, slice(1, 2)).views(["0.key", "3.value"])
    views["0.key"][...] = 1
    assert cache.buffers["0.key"].sum(axis=(1, 2, 3)).astype(bool).tolist() == [False, True, False]
    executor.run(cache, Batch([1], [[5, 6, 7]], "prompt", executor.manifest.full))
    assert cache.lengths[0].tolist() == [0, 3, 0] and cache.positions.tolist() == [0, 3, 0]
    cache.rewind(1)
    assert not cache.lengths.any() and not cache.positions.any()


@pytest.mark.parametrize("rows", [1 << 40, 1 << 62])
def test_more_than_there_is_memory_for_is_told(executor: Executor, rows: int) -> None:
    with pytest.raises(DynexportError, match=r"^cache: \d+ rows of 256 tokens need \d+\.\d GiB, more than there is"):
        executor.cache(rows, 256)
