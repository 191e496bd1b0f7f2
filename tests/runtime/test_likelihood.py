"""Likelihoods of continuations: PyTorch's numbers, for pairs of any length, however many run together."""

from __future__ import annotations

import numpy as np
import pytest
from bundles import CONFORMANCE
from forms import FORMS, executor_of

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime import DynexportError
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.likelihood import Likelihood, likelihoods

LENGTHS = [(5, 7), (1, 1), (3, 0), (12, 2), (2, 20), (9, 1)]


def pairs_of(executor: Executor) -> list[tuple[list[int], list[int]]]:
    rng, most = np.random.default_rng(3), executor.manifest.model.vocab_size
    return [(rng.integers(0, most, a).tolist(), rng.integers(0, most, b).tolist()) for a, b in LENGTHS]


def by_steps(executor: Executor, pair: tuple[list[int], list[int]], depth: object) -> Likelihood:
    """The likelihood of one pair, a decode step for each token."""
    context, continuation = pair
    cache = executor.full_cache(1, len(context) + len(continuation))
    total, greedy, chosen = 0.0, True, executor.bundle.depth(depth)  # type: ignore[arg-type]
    for number, token in enumerate(continuation):
        previous = continuation[number - 1 : number]
        logits = (
            executor.step(cache, previous, chosen) if previous else executor.prefill(cache, [context], depth=chosen)[0]
        )
        values = logits[0].astype(np.float64)
        total += values[token] - np.log(np.exp(values).sum())
        greedy = greedy and int(values.argmax()) == token
    return Likelihood(total, greedy)


# Tokens of a call attend to each other's keys and values before they are rounded to int8, single ones to rounded ones.
@pytest.mark.parametrize("form", [form for form in FORMS if "int8-caches" not in form])
def test_each_pair_is_as_in_steps_alone(form: str) -> None:
    executor = executor_of(form)
    pairs = pairs_of(executor)
    for depth in (1, *(depth.name for depth in executor.manifest.depths[:1])):
        done: list[int] = []
        found = likelihoods(executor, pairs, depth=executor.bundle.depth(depth), rows=3, chunk=4, progress=done.append)
        wanted = [by_steps(executor, pair, depth) for pair in pairs]
        assert [each.log_likelihood for each in found] == pytest.approx([w.log_likelihood for w in wanted], abs=1e-4)
        assert [each.greedy for each in found] == [each.greedy for each in wanted]
        assert sum(done) == len(pairs)


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_reference_agrees(ratio: int) -> None:
    pytest.importorskip("transformers")
    executor = executor_of("skip")
    pairs = [pair for pair in pairs_of(executor) if pair[1]]
    depth = executor.bundle.depth(ratio)
    reference = Reference.from_checkpoint(open_checkpoint(CONFORMANCE / "skip-2x"))
    runs = [unified_skip_runs(len(a), len(a) + len(b), depth.keep, 8) for a, b in pairs]
    for found, (context, continuation), run in zip(likelihoods(executor, pairs, depth=depth), pairs, runs, strict=True):
        logits = np.asarray(reference.logits([context + continuation], [run])[0], np.float64)[len(context) - 1 : -1]
        chosen = logits[np.arange(len(continuation)), continuation]
        assert found.log_likelihood == pytest.approx(float((chosen - np.log(np.exp(logits).sum(-1))).sum()), abs=1e-4)


def test_a_greedy_continuation_is_known() -> None:
    executor = executor_of("dense")
    cache = executor.full_cache(1, 12)
    logits, ids = executor.prefill(cache, [[1, 2, 3]])[0], []
    for _ in range(6):
        ids.append(int(logits[0].argmax()))
        logits = executor.step(cache, ids[-1:], executor.manifest.full)
    other = [*ids[:-1], (ids[-1] + 1) % executor.manifest.model.vocab_size]
    found = likelihoods(executor, [([1, 2, 3], ids), ([1, 2, 3], other)], depth=executor.manifest.full)
    assert [each.greedy for each in found] == [True, False]
    assert found[0].log_likelihood > found[1].log_likelihood


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 0: expected 1 to 40 tokens without the last, found 0 and 1"),
        (([1], [10**6]), "continuation: "),
        (([1] * 30, [1] * 12), "pair 0: expected 1 to 40 tokens without the last, found 30 and 12"),
    ],
)
def test_bad_pairs(pair: tuple[list[int], list[int]], message: str) -> None:
    executor = executor_of("dense")
    with pytest.raises(DynexportError, match=message):
        likelihoods(executor, [pair], depth=executor.manifest.full)
    assert likelihoods(executor, [([1] * 30, [1] * 11)], depth=executor.manifest.full)
