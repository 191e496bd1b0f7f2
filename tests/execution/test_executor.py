"""Steps over a cache: rows of a batch do not touch each other, and what cannot be run is refused before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.execution.executor import Executor

PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
# float32 in another order of addition; logits are of the order of 1.
SAME = 2e-5


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_rows_of_a_batch_are_what_they_are_alone(executor: Executor, chunk: int) -> None:
    keep = executor.bundle.depth(2)
    together = executor.full_cache(len(PROMPTS), 16)
    found = [np.concatenate(executor.prefill(together, PROMPTS, chunk=chunk))]
    found += [executor.step(together, [step] * len(PROMPTS), keep) for step in range(4)]
    for row, prompt in enumerate(PROMPTS):
        cache = executor.full_cache(1, 16)
        alone = [executor.prefill(cache, [prompt])[0], *(executor.step(cache, [step], keep) for step in range(4))]
        np.testing.assert_allclose([step[row] for step in found], np.concatenate(alone), atol=SAME)


def test_all_logits_end_with_the_last(executor: Executor) -> None:
    every = executor.prefill(executor.full_cache(4, 16), PROMPTS, all_logits=True)
    last = executor.prefill(executor.full_cache(4, 16), PROMPTS)
    assert [len(logits) for logits in every] == [len(prompt) for prompt in PROMPTS]
    for a, b in zip(every, last, strict=True):
        np.testing.assert_allclose(a[-1], b[0], atol=SAME)


def test_a_row_that_has_ended_gets_no_entry_and_disturbs_none(executor: Executor) -> None:
    keep = executor.bundle.depth(2)
    cache, alone = executor.full_cache(2, 8), executor.full_cache(1, 8)
    executor.prefill(cache, [[1, 2, 3], [4]])
    executor.prefill(alone, [[1, 2, 3]])
    live = np.array([True, False])
    before = cache.buffers["0.key"][1, :, :1].copy()
    for token in range(5):
        found = executor.step(cache, [token, 88], keep, live)
        np.testing.assert_allclose(found[0], executor.step(alone, [token], keep)[0], atol=SAME)
    assert cache.positions.tolist() == [8, 1]
    assert cache.lengths[0].tolist() == [8, 1] and cache.lengths[1].tolist() == [3, 1]
    np.testing.assert_array_equal(cache.buffers["0.key"][1, :, :1], before)


def test_a_full_context_is_told(short: Executor) -> None:
    cache = short.full_cache(1, 1000)
    short.prefill(cache, [[1] * 24])
    with pytest.raises(DynexportError, match="all 24 slots of a row are used; the context is exhausted"):
        short.step(cache, [1], short.bundle.depth(1))
    with pytest.raises(DynexportError, match=r"expected at most 0 tokens to fit the context of 24, found 1"):
        short.prefill(cache, [[1]])


@pytest.mark.parametrize("bad", [-1, 89, 2**40, 2**70, 1.0, "1", None, True, [1]])
def test_what_is_no_token_is_refused(executor: Executor, bad: Any) -> None:
    cache = executor.full_cache(2, 8)
    with pytest.raises(DynexportError, match=r"^prompt: expected token ids 0\.\.88, found"):
        executor.prefill(cache, [[1, 2], [3, bad]])
    assert not cache.positions.any()


def test_an_empty_prompt_is_refused(executor: Executor) -> None:
    with pytest.raises(DynexportError, match=r"^prompt: expected at least one token, found none"):
        executor.prefill(executor.full_cache(2, 8), [[1, 2], []])


def test_prompts_may_be_arrays_or_lists_of_numpy_integers(executor: Executor) -> None:
    expected = executor.prefill(executor.full_cache(1, 8), [[1, 2, 3]])[0]
    array = np.array([1, 2, 3], np.uint8)
    for prompt in (array, list(array), tuple(array.astype(np.int64))):
        np.testing.assert_array_equal(executor.prefill(executor.full_cache(1, 8), [prompt])[0], expected)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_are_a_number_that_makes_sense(bundle: Bundle, threads: int) -> None:
    with pytest.raises(DynexportError, match=rf"^threads: expected 1\.\.256, found {threads}"):
        Executor(bundle, threads)


def test_a_static_bundle_runs_its_own_kept_sets_only(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", static=True, golden=False)
    bundle = Bundle.open(tmp_path / "b")
    executor = Executor(bundle, 1)
    cache = executor.full_cache(1, 8)
    executor.prefill(cache, [[1]])
    executor.step(cache, [1], bundle.depth(2))
    other = bundle.depth(2).model_copy(update={"name": "other", "keep": (0, 7)})
    with pytest.raises(DynexportError, match="no graph for the phase decode at the depth other; convert again with it"):
        executor.step(cache, [1], other)
