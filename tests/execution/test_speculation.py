"""Steps with drafts: the tokens and the caches of decoding without them, whatever is drafted and accepted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from forms import CONTEXT, FORMS, executor_of

from dynexport.runtime import Bundle, DynexportError, Sampling
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kept import keep_first
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.drafts import DraftedRow, Proposal
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.speculation import Speculation, Speculator, depth_of_layers

Array = np.ndarray
SAME = 5e-5  # float32 in another order of addition


# In int8 caches, tokens of a call attend to each other before they are rounded, which single ones cannot.
EXACT = [form for form in FORMS if "int8-caches" not in form]


@pytest.mark.parametrize("form", EXACT)
def test_the_first_tokens_of_a_run_are_kept_as_if_the_others_had_never_run(form: str) -> None:
    executor = executor_of(form)
    generator, full = np.random.default_rng(3), executor.manifest.full
    for kept in (1, 2, 4):
        prompts = [generator.integers(0, 80, size) for size in (3, 7)]
        drafted = [generator.integers(0, 80, 5).tolist() for _ in prompts]
        (given, logs), (cut, cut_logs) = (
            _continued(executor, prompts, drafted, kept, at_once=at_once) for at_once in (False, True)
        )
        assert np.array_equal(given.lengths, cut.lengths) and np.array_equal(given.positions, cut.positions)
        assert np.array_equal(given.overflow, cut.overflow)
        for plain, one in zip(logs, cut_logs, strict=True):
            assert np.array_equal(plain, one)
        next_tokens = [[5], [6]]
        plain, one = (executor.run(cache, Batch([0, 1], next_tokens, "decode", full)).logits for cache in (given, cut))
        assert np.abs(np.concatenate(plain) - np.concatenate(one)).max() < SAME


def _continued(
    executor: Executor, prompts: Sequence[Array], drafted: Sequence[list[int]], kept: int, *, at_once: bool
) -> tuple[KvCache, list[Array]]:
    """Two rows after their prompts and ``kept`` tokens: one by one, or the first of five that ran at once."""
    full, cache = executor.manifest.full, executor.full_cache(2, CONTEXT, record=True)
    executor.prefill(cache, prompts)
    if at_once:
        marks = [cache.mark(0), cache.mark(1)]
        result = executor.run(cache, Batch([0, 1], drafted, "decode", full, "all"))
        for row, mark in enumerate(marks):
            decisions = None if result.decisions is None else result.decisions[row]
            keep_first(executor, cache, mark, drafted[row][:kept], full, decisions)
    else:
        for index in range(kept):
            executor.run(cache, Batch([0, 1], [[ids[index]] for ids in drafted], "decode", full))
    assert cache.logs is not None
    return cache, [executor.reader.joined(log).choices for log in cache.logs]


class Planted:
    """Drafts the tokens that will come, some of them changed: every pattern of accepted and rejected ones."""

    def __init__(self, coming: dict[int, list[int]]) -> None:
        self._coming, self._generator = coming, np.random.default_rng(7)
        self.drafted = 0

    def proposals(self, rows: Sequence[DraftedRow], most: Sequence[int]) -> list[Proposal]:
        return [Proposal.alike(1.0, int(self._generator.integers(0, limit + 1))) for limit in most]

    def drafts(
        self, cache: KvCache, rows: Sequence[DraftedRow], proposals: Sequence[Proposal], counts: Sequence[int]
    ) -> list[list[int]]:
        found = []
        for row, count in zip(rows, counts, strict=True):
            done = len(row.known) - _PROMPTS[row.row][1]
            ids = self._coming[row.row][done : done + count]
            wrong = self._generator.random(len(ids)) < 0.3
            found.append([(token + 1) % 80 if other else token for token, other in zip(ids, wrong, strict=True)])
            self.drafted += len(ids)
        return found


_PROMPTS = [([5, 6, 7], 3), ([9, 8, 7, 6, 5], 5), ([1], 1)]
_NEW = 24


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, seed=4, repetition_penalty=1.2)])
@pytest.mark.parametrize("form", EXACT)
def test_tokens_do_not_depend_on_drafts(form: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    executor = executor_of(form)
    model = Model(executor.bundle, threads=1)
    model.executor = executor
    prompts = [prompt for prompt, _ in _PROMPTS]
    plain = model.generate(prompts, max_new_tokens=_NEW, sampling=sampling, depth="full")
    planted = Planted({row: each.ids for row, each in enumerate(plain)})
    monkeypatch.setattr(Speculator, "of", lambda executor, asked: Speculator(executor, planted, asked))
    how = Speculation(4, always=True)
    drafted = model.generate(prompts, max_new_tokens=_NEW, sampling=sampling, depth="full", speculation=how)
    assert planted.drafted > 40
    assert [each.ids for each in drafted] == [each.ids for each in plain]


def test_a_model_whose_tokens_compete_is_refused() -> None:
    executor = executor_of("radial-single-step")
    manifest = executor.manifest
    competing = manifest.model_copy(update={"limits": manifest.limits.model_copy(update={"compete": True})})
    model = Model(Bundle(executor.bundle.path, competing), threads=1)
    with pytest.raises(DynexportError, match="speculate: expected a model whose tokens do not depend on the others"):
        model.generate([1, 2, 3], speculation=Speculation(4))


def test_sampled_tokens_have_the_distribution_of_the_full_model() -> None:
    """The second token of 1,024 texts beside its exact distribution; drafts without one layer differ from it."""
    executor = executor_of("skip-plugins")
    model, full, size = Model(executor.bundle, threads=1), executor.manifest.full, executor.manifest.model.vocab_size
    model.executor = executor
    prompt, drafts = [5, 6, 7], Speculation(2, depth_of_layers(executor.manifest, [0, 1, 2, 3, 4, 5, 7]), always=True)
    found, accepted, rejected = np.zeros(size), 0, 0
    for seed in range(8):
        stream = model.stream(
            [prompt] * 128,
            max_new_tokens=4,
            sampling=Sampling(temperature=0.4, seed=seed),
            depth="full",
            speculation=drafts,
        )
        seen: set[int] = set()
        for number, piece in enumerate(stream):
            if number >= 128 and piece.row not in seen:
                seen.add(piece.row)
                found[piece.token] += 1
                accepted += piece.draft == piece.token
                rejected += piece.draft not in (None, piece.token)
    assert accepted > 50 and rejected > 50, (accepted, rejected)
    cache = executor.full_cache(size, 8)
    first = _softmax(executor.prefill(cache, [prompt] * size)[0] / 0.4)[0]
    second = executor.run(cache, Batch(range(size), [[token] for token in range(size)], "decode", full)).logits
    ends = executor.manifest.tokens.eos  # a text that ends has no second token
    first[list(ends)] = 0
    expected = first @ _softmax(np.concatenate(second) / 0.4) * (8 * 128)
    often = expected >= 5
    pairs = np.array([*zip(found[often], expected[often], strict=True), (found[~often].sum(), expected[~often].sum())])
    distance = float(((pairs[:, 0] - pairs[:, 1]) ** 2 / np.maximum(pairs[:, 1], 1)).sum())
    freedom = len(pairs) - 1
    assert distance < freedom + 5 * np.sqrt(2 * freedom), (distance, freedom)


def _softmax(logits: Array) -> Array:
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))
