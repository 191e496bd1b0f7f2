"""Perplexity through the decode path against PyTorch's, teacher-forced with the same layers skipped."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import CONFORMANCE

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.measure.evaluate import Evaluation, evaluate

WINDOW, PROMPT, WINDOWS = 14, 5, 5
IDS = np.random.default_rng(0).integers(0, 89, WINDOW * WINDOWS + 3).tolist()


def measure(bundle: Bundle, **options: int) -> list[Evaluation]:
    sizes = {"window": WINDOW, "prompt_tokens": PROMPT, "threads": 1, **options}
    return evaluate(bundle, IDS, depths=[bundle.depth(1), bundle.depth(2)], **sizes)


def test_the_reference_agrees(bundle: Bundle) -> None:
    pytest.importorskip("transformers")
    reference = Reference.from_checkpoint(open_checkpoint(CONFORMANCE / "skip-2x"))
    windows = np.reshape(IDS[: WINDOW * WINDOWS], (WINDOWS, WINDOW))
    for found, keep in zip(measure(bundle), (range(8), (0, 2, 4, 7)), strict=True):
        runs = [unified_skip_runs(PROMPT, WINDOW, keep, 8)] * WINDOWS
        logits = np.stack(reference.logits(windows.tolist(), runs)).astype(np.float64)[:, PROMPT - 1 : -1]
        targets = np.take_along_axis(logits, windows[:, PROMPT:, None], axis=-1)[..., 0]
        loss = (np.log(np.exp(logits).sum(axis=-1)) - targets).mean()
        assert found.mean_loss == pytest.approx(loss, abs=1e-5)
        assert found.perplexity == pytest.approx(np.exp(loss), rel=1e-4)
        assert (found.tokens, found.layers) == (WINDOWS * (WINDOW - PROMPT), len(keep))


def test_the_batch_does_not_matter(bundle: Bundle) -> None:
    one, three = ([found.mean_loss for found in measure(bundle, batch=batch)] for batch in (1, 3))
    assert one == pytest.approx(three, abs=1e-6)
    assert one[0] != pytest.approx(one[1], abs=1e-3), "the ratio does matter"


def test_whole_windows_within_the_limit_are_used(bundle: Bundle) -> None:
    assert [found.tokens for found in measure(bundle, max_tokens=3 * WINDOW - 1)] == [2 * (WINDOW - PROMPT)] * 2


def test_progress_counts_every_group(bundle: Bundle) -> None:
    calls: list[tuple[int, int]] = []
    evaluate(
        bundle,
        IDS,
        depths=[bundle.depth(1), bundle.depth(2)],
        window=WINDOW,
        prompt_tokens=PROMPT,
        batch=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(done, 6) for done in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 257}, "window: expected 1 <= prompt_tokens < window <= 256, found 5 and 257"),
        ({"prompt_tokens": 0}, "found 0 and 14"),
        ({"prompt_tokens": 14}, "found 14 and 14"),
        ({"batch": 0}, "batch: expected at least 1, found 0"),
        ({"max_tokens": 13}, "max_tokens: expected at least one window of 14, found 13"),
        ({"max_tokens": -1}, "max_tokens: expected at least one window of 14, found -1"),
        ({"window": 100}, "text: expected at least one window of 100 tokens, found 73 tokens"),
        ({"threads": 0}, r"threads: expected 1\.\.256, found 0"),
    ],
)
def test_sizes_out_of_range(bundle: Bundle, options: dict[str, int], message: str) -> None:
    with pytest.raises(DynexportError, match=message):
        measure(bundle, **options)


@pytest.mark.parametrize("bad", [-1, 89])
def test_tokens_that_the_model_lacks_are_told(bundle: Bundle, bad: int) -> None:
    # The last token of a window is a target only, and reaches no graph.
    ids = [*IDS[: WINDOW - 1], bad]
    with pytest.raises(DynexportError, match=rf"text: expected token ids 0\.\.88, found {bad}"):
        evaluate(bundle, ids, depths=[bundle.depth(1)], window=WINDOW, prompt_tokens=PROMPT)
