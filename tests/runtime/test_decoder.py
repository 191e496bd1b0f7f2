"""Steps over a cache: rows of a batch do not touch each other, and what cannot be run is refused before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Model
from dynexport.runtime.execution.decoder import Decoder

PROMPTS = [[5], [7, 8, 9, 10, 11], [3, 4], [60, 61, 62, 63, 64, 65, 66, 67, 68]]
# float32 in another order of addition; logits are of the order of 1.
SAME = 2e-5


@pytest.fixture
def decoder(generator: Model) -> Decoder:
    return generator.decoder


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_rows_of_a_batch_are_what_they_are_alone(decoder: Decoder, chunk: int) -> None:
    keep = decoder.bundle.depth(2)
    together = decoder.cache(len(PROMPTS), 16)
    found = [np.concatenate(decoder.prefill(together, PROMPTS, chunk=chunk))]
    found += [decoder.step(together, [step] * len(PROMPTS), keep) for step in range(4)]
    for row, prompt in enumerate(PROMPTS):
        cache = decoder.cache(1, 16)
        alone = [decoder.prefill(cache, [prompt])[0], *(decoder.step(cache, [step], keep) for step in range(4))]
        np.testing.assert_allclose([step[row] for step in found], np.concatenate(alone), atol=SAME)


def test_all_logits_end_with_the_last(decoder: Decoder) -> None:
    every = decoder.prefill(decoder.cache(4, 16), PROMPTS, all_logits=True)
    last = decoder.prefill(decoder.cache(4, 16), PROMPTS)
    assert [len(logits) for logits in every] == [len(prompt) for prompt in PROMPTS]
    for a, b in zip(every, last, strict=True):
        np.testing.assert_allclose(a[-1], b[0], atol=SAME)


def test_a_row_that_has_ended_gets_no_entry_and_disturbs_none(decoder: Decoder) -> None:
    keep = decoder.bundle.depth(2)
    cache, alone = decoder.cache(2, 8), decoder.cache(1, 8)
    decoder.prefill(cache, [[1, 2, 3], [4]])
    decoder.prefill(alone, [[1, 2, 3]])
    live = np.array([True, False])
    before = cache.row(1).buffers["0.key"][:, :, :1].copy()
    for token in range(5):
        found = decoder.step(cache, [token, 88], keep, live)
        np.testing.assert_allclose(found[0], decoder.step(alone, [token], keep)[0], atol=SAME)
    assert cache.positions.tolist() == [8, 1]
    assert cache.lengths[0].tolist() == [8, 1] and cache.lengths[1].tolist() == [3, 1]
    np.testing.assert_array_equal(cache.row(1).buffers["0.key"][:, :, :1], before)


def test_a_full_context_is_told(short: Model) -> None:
    decoder = short.decoder
    cache = decoder.cache(1, 1000)
    decoder.prefill(cache, [[1] * 24])
    with pytest.raises(DynexportError, match="all 24 slots of a row are used; the context is exhausted"):
        decoder.step(cache, [1], decoder.bundle.depth(1))
    with pytest.raises(DynexportError, match=r"expected at most 0 tokens to fit the context of 24, found 1"):
        decoder.prefill(cache, [[1]])


@pytest.mark.parametrize("bad", [-1, 89, 2**40, 2**70, 1.0, "1", None, True, [1]])
def test_what_is_no_token_is_refused(decoder: Decoder, bad: Any) -> None:
    cache = decoder.cache(2, 8)
    with pytest.raises(DynexportError, match=r"^prompt: expected token ids 0\.\.88, found"):
        decoder.prefill(cache, [[1, 2], [3, bad]])
    assert not cache.positions.any()


def test_an_empty_prompt_is_refused(decoder: Decoder) -> None:
    with pytest.raises(DynexportError, match=r"^prompt: expected at least one token, found none"):
        decoder.prefill(decoder.cache(2, 8), [[1, 2], []])


def test_prompts_may_be_arrays_or_lists_of_numpy_integers(decoder: Decoder) -> None:
    expected = decoder.prefill(decoder.cache(1, 8), [[1, 2, 3]])[0]
    array = np.array([1, 2, 3], np.uint8)
    for prompt in (array, list(array), tuple(array.astype(np.int64))):
        np.testing.assert_array_equal(decoder.prefill(decoder.cache(1, 8), [prompt])[0], expected)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_are_a_number_that_makes_sense(bundle: Bundle, threads: int) -> None:
    with pytest.raises(DynexportError, match=rf"^threads: expected 1\.\.256, found {threads}"):
        Decoder(bundle, threads)


def test_a_static_bundle_runs_its_own_kept_sets_only(tmp_path: Path) -> None:
    convert(CONFORMANCE / "skip-2x", tmp_path / "b", static=True, golden=False)
    bundle = Bundle.open(tmp_path / "b")
    decoder = Decoder(bundle, 1)
    cache = decoder.cache(1, 8)
    decoder.prefill(cache, [[1]])
    decoder.step(cache, [1], bundle.depth(2))
    other = bundle.depth(2).model_copy(update={"name": "other", "keep": (0, 7)})
    with pytest.raises(DynexportError, match="no graph for speedup other; convert again with it"):
        decoder.step(cache, [1], other)
