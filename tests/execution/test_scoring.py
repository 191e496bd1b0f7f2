"""Log probabilities of given tokens: those of decode steps in every form of graph, and PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from forms import CONTEXT, FORMS, executor_of

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime import DynexportError, Model
from dynexport.runtime.generation import scoring
from dynexport.runtime.generation.scoring import score

IDS = np.random.default_rng(3).integers(0, 89, 20).tolist()
PROMPT = 6


def model_of(form: str) -> Model:
    executor = executor_of(form)
    model = Model(executor.bundle, threads=1)
    model.executor = executor
    return model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    return np.asarray(values - np.log(np.exp(values).sum(axis=-1, keepdims=True)))


# Tokens of a call attend to each other's keys and values before they are rounded to int8, single ones to rounded ones.
@pytest.mark.parametrize("form", [form for form in FORMS if "int8-caches" not in form])
def test_scores_are_those_of_decode_steps(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_CHUNK", 5)
    model = model_of(form)
    executor = model.executor
    for depth in executor.manifest.depths[:2]:
        cache = executor.full_cache(1, len(IDS))
        (logits,) = executor.prefill(cache, [IDS[:PROMPT]], depth=depth)
        expected = [log_softmax(logits[-1])[IDS[PROMPT]]]
        for fed, token in zip(IDS[PROMPT:], IDS[PROMPT + 1 :], strict=False):
            expected.append(log_softmax(executor.step(cache, [fed], depth)[0])[token])
        found = score(model, IDS[:PROMPT], IDS[PROMPT:], depth=depth)
        assert [each.logprob for each in found] == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("ratio", [1, 2])
def test_scores_are_those_of_the_reference(ratio: int) -> None:
    reference = Reference.from_checkpoint(open_checkpoint(CONFORMANCE / "skip-2x"))
    model = model_of("skip")
    depth = model.depth(ratio)
    (logits,) = reference.logits([IDS], [unified_skip_runs(PROMPT, len(IDS), depth.keep, 8)])
    expected = log_softmax(logits[PROMPT - 1 : -1])
    found = score(model, IDS[:PROMPT], IDS[PROMPT:], depth=depth, logprobs=3)
    for each, row, token in zip(found, expected, IDS[PROMPT:], strict=True):
        assert each.logprob == pytest.approx(row[token], abs=1e-4)
        assert [token for token, _ in each.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in each.top] == pytest.approx(np.sort(row)[:-4:-1].tolist(), abs=1e-4)


def test_a_continuation_of_one_token_or_none() -> None:
    model = model_of("skip")
    (one,) = score(model, IDS[:2], IDS[2:3])
    assert one == score(model, IDS[:2], IDS[2:])[0]
    assert score(model, IDS[:2], []) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "prompt: expected at least one token"),
        ({"prompt": [89]}, "prompt: expected token ids 0..88"),
        ({"continuation": [-1]}, "continuation: expected token ids 0..88"),
        ({"continuation": [1] * CONTEXT}, f"prompt: expected at most {CONTEXT} tokens together with the continuation"),
        ({"prompt": "text"}, "has no tokenizer"),
        ({"logprobs": 21}, "logprobs: expected 0..20"),
        ({"depth": 9}, "9"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError) as refused:
        score(model_of("skip"), **{"prompt": [1], "continuation": [2], **arguments})
    assert message in str(refused.value)
