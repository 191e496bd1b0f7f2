"""Sampling: greedy, the filters, the draws, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process as hf

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.filters import distribution
from dynexport.runtime.generation.filters import draw as draw_one
from dynexport.runtime.generation.sampler import Choice, RowSampler, Sampler, choose
from dynexport.runtime.generation.sampling import Sampling

# Few distinct values, so that ties are common; minus infinity is a masked token.
tied_logits = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 12)),
    elements=st.sampled_from([-np.inf, -3.0, 0.0, 0.5, 2.0, 1e4]),
).filter(lambda logits: bool(np.isfinite(logits.max(axis=1)).all()))


def draw(logits: NDArray[np.float32], steps: int = 1, **fields: Any) -> NDArray[np.int64]:
    """int64 [steps, rows]: the tokens of the same logits, step after step."""
    sampler = Sampler(Sampling(**fields), len(logits))
    return np.stack([sampler(logits) for _ in range(steps)])


@given(tied_logits)
def test_greedy_takes_the_lowest_id_of_the_largest(logits: NDArray[np.float32]) -> None:
    expected = [row.tolist().index(max(row.tolist())) for row in logits]
    (tokens,) = draw(logits)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == expected


@given(tied_logits, st.integers(0, 2**32))
def test_one_candidate_is_greedy(logits: NDArray[np.float32], seed: int) -> None:
    greedy = draw(logits)
    for fields in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300, "top_k": 1}):
        assert np.array_equal(draw(logits, **{"temperature": 1.0, "seed": seed, **fields}), greedy), fields


@given(tied_logits, st.integers(1, 12), st.floats(0.01, 1), st.floats(0.1, 10), st.integers(0, 99))
def test_draws_stay_within_the_filters(
    logits: NDArray[np.float32], top_k: int, top_p: float, temperature: float, seed: int
) -> None:
    tokens = draw(logits, 3, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for row, column in zip(logits, tokens.T, strict=True):
        assert set(column.tolist()) <= allowed(row, top_k, top_p, temperature)


def allowed(row: NDArray[np.float32], top_k: int, top_p: float, temperature: float) -> set[int]:
    """The ids that may be drawn, counted out one by one."""
    ranked = sorted(range(len(row)), key=lambda token: (-row[token], token))[:top_k]
    largest = float(max(row))
    weights = [float(np.exp((float(row[token]) - largest) / temperature)) for token in ranked]
    kept: set[int] = set()
    reached = 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if weight > 0 and (not kept or reached < top_p + 1e-12):
            kept.add(token)
        reached += weight / sum(weights)
    return kept


def test_top_p_is_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([[0.15, 0.5, 0.05, 0.3]], dtype=np.float32))
    reached = {0.5: {1}, 0.51: {1, 3}, 0.79: {1, 3}, 0.81: {0, 1, 3}, 0.96: {0, 1, 2, 3}}
    for top_p, expected in reached.items():
        tokens = draw(logits, 400, temperature=1.0, top_p=top_p - 1e-6, seed=3)
        assert set(tokens[:, 0].tolist()) == expected, top_p


@pytest.mark.parametrize(("count", "top_p"), [(1, 0.125), (3, 0.375), (4, 0.5), (7, 0.875)])
def test_a_top_p_that_is_met_exactly_needs_no_further_token(count: int, top_p: float) -> None:
    """Eight tokens of one eighth each: sums of them are exact."""
    row = np.full(12, -np.inf, np.float32)
    row[2:10] = 1.5
    expected = list(range(2, 2 + count))
    at = {
        np.nextafter(top_p, 0): expected,
        top_p: expected,
        np.nextafter(top_p, 1): [*expected, 2 + count],
    }
    for threshold, ids in at.items():
        found, probabilities = distribution(row, Sampling(temperature=0.7, top_p=threshold))
        assert found.tolist() == ids and (probabilities == 0.125).all()
        tokens = draw(row[None], 300, temperature=0.7, top_p=threshold, seed=2)
        assert set(tokens[:, 0].tolist()) == set(ids)


@pytest.mark.parametrize(("min_p", "typical_p"), [(0.0, 1.0), (0.01, 1.0), (0.0, 0.9), (0.001, 0.2)])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.125, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
def test_the_filters_are_those_of_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    rows = np.random.default_rng(8).normal(0, 3, (4, 200)).astype(np.float32)
    rows[1, ::3] = -np.inf
    rows[2, :] = np.where(np.arange(200) < 8, 1.5, -np.inf)  # one eighth each: top_p is met exactly
    told = [hf.TemperatureLogitsWarper(temperature)]
    told += [hf.TopKLogitsWarper(top_k)] if top_k else []
    told += [hf.TopPLogitsWarper(top_p)] if top_p < 1 else []
    told += [hf.MinPLogitsWarper(min_p)] if min_p else []
    told += [hf.TypicalLogitsWarper(typical_p)] if typical_p < 1 else []
    scores = torch.tensor(rows, dtype=torch.float64)
    for warper in told:
        scores = warper(None, scores)
    expected = scores.softmax(-1).numpy()
    for index, row in enumerate(rows):
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p)
        ids, probabilities = distribution(row, sampling)
        likely = ids[probabilities > 0]
        if index == 2:  # of equals transformers keeps others, under top_k all
            if top_k in (0, 500):
                assert len(likely) == (expected[index] > 0).sum()
            continue
        assert likely.tolist() == np.flatnonzero(expected[index]).tolist()
        np.testing.assert_allclose(probabilities / probabilities.sum(), expected[index][ids], rtol=1e-9)


def test_the_edges_of_the_temperature() -> None:
    row = np.array([3.0, 1.0, 3.0, -np.inf, 2.9999998], np.float32)
    cold, hot = (distribution(row, Sampling(temperature=value))[1] for value in (5e-324, 1e300))
    assert cold.tolist() == [0.5, 0, 0.5, 0, 0]
    np.testing.assert_allclose(hot, [0.25, 0.25, 0.25, 0, 0.25])
    for temperature in (5e-324, 1e-30, 1e300):
        tokens = set(draw(row[None], 200, temperature=temperature, seed=1)[:, 0].tolist())
        assert tokens == ({0, 2} if temperature < 1 else {0, 1, 2, 4})
    assert (draw(row[None], 20, temperature=0, seed=1) == 0).all()


def test_min_p_is_a_share_of_the_most_probable() -> None:
    logits = np.log(np.array([[0.1, 0.5, 0.05, 0.35]], dtype=np.float32))
    for min_p, expected in {0.09: {0, 1, 2, 3}, 0.11: {0, 1, 3}, 0.69: {1, 3}, 0.71: {1}, 1.0: {1}}.items():
        tokens = draw(logits, 400, temperature=1.0, min_p=min_p, seed=3)
        assert set(tokens[:, 0].tolist()) == expected, min_p


def test_frequencies_follow_the_softmax() -> None:
    logits = np.array([[0.0, 1.0, 2.0, -np.inf]], dtype=np.float32)
    steps = 20_000
    for temperature in (0.5, 1.0, 3.0):
        tokens = draw(logits, steps, temperature=temperature, seed=11)[:, 0]
        weights = np.exp(logits[0].astype(np.float64) / temperature)
        expected = weights / weights.sum()
        found = np.bincount(tokens, minlength=4) / steps
        tolerance = 5 * np.sqrt(expected * (1 - expected) / steps)  # five standard deviations
        assert (np.abs(found - expected) <= tolerance).all(), (temperature, found, expected)


def test_top_k_is_renormalised_before_top_p() -> None:
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]], dtype=np.float32))
    # Among the two most probable, the first has 2/3; among all four it has 0.4.
    tokens = draw(logits, 300, temperature=1.0, top_k=2, top_p=0.6, seed=5)
    assert set(tokens[:, 0].tolist()) == {0}


def test_a_seed_repeats_and_another_differs() -> None:
    logits = np.zeros((2, 1000), dtype=np.float32)
    first = draw(logits, 20, temperature=1.0, seed=1)
    assert np.array_equal(first, draw(logits, 20, temperature=1.0, seed=1))
    assert not np.array_equal(first, draw(logits, 20, temperature=1.0, seed=2))
    assert not np.array_equal(first[:, 0], first[:, 1])
    unseeded = [draw(logits, 20, temperature=1.0) for _ in range(2)]
    assert not np.array_equal(*unseeded)


@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(0, 99), st.floats(0.2, 1), st.integers(0, 8))
def test_a_row_does_not_depend_on_the_others(rows: int, seed: int, top_p: float, top_k: int) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, 16)).astype(np.float32)
    fields = {"temperature": 0.9, "top_p": top_p, "top_k": top_k, "seed": seed}
    changed = logits.copy()
    changed[1:] = generator.normal(size=(rows - 1, 16))
    together = draw(logits, 6, **fields)
    assert np.array_equal(together[:, 0], draw(changed, 6, **fields)[:, 0])
    assert np.array_equal(together[:, 0], draw(logits[:1], 6, **fields)[:, 0])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("seed", -1),
        ("seed", 0.5),
        ("min_p", 1.5),
        ("min_p", None),
        ("typical_p", 0),
        ("typical_p", "1"),
        ("repetition_penalty", 0),
        ("repetition_penalty", 4.7e-189),
        ("repetition_penalty", []),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("presence_penalty", -2.1),
        ("presence_penalty", "1"),
        ("logit_bias", 3),
        ("logit_bias", [(1, 2.0)]),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("min_new_tokens", -1),
        ("min_new_tokens", 1.0),
        ("no_repeat_ngram_size", 1025),
        ("no_repeat_ngram_size", "2"),
        ("suppress_tokens", 5),
        ("suppress_tokens", "12"),
        ("begin_suppress_tokens", None),
        ("bad_words_ids", "12"),
        ("bad_words_ids", 1),
    ],
)
def test_a_field_outside_its_range_is_named_with_its_value(field: str, value: Any) -> None:
    with pytest.raises(DynexportError) as caught:
        Sampling(**{field: value})
    assert field in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1.0, np.nan], [1.0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_no_distribution_are_refused(temperature: float, bad: list[float]) -> None:
    logits = np.array([[1.0, 2.0], bad], dtype=np.float32)
    with pytest.raises(DynexportError, match="row 1"):
        draw(logits, temperature=temperature, seed=0)


@pytest.mark.parametrize("shape", [(3, 4), (2, 0), (8,)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DynexportError, match=r"expected shape \[2, vocab\]"):
        Sampler(Sampling(), 2)(np.zeros(shape, dtype=np.float32))


@given(tied_logits, st.lists(st.integers(0, 15), max_size=6), st.floats(0.5, 2))
def test_the_penalty_of_repetition_is_that_of_transformers(
    logits: NDArray[np.float32], before: list[int], penalty: float
) -> None:
    sampler = Sampler(Sampling(repetition_penalty=penalty), len(logits))
    histories = [[token for token in before if token < logits.shape[1]] for _ in logits]
    for row in range(len(logits)):
        sampler.see(row, before)
    process = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(3):
        rows = [
            process(torch.tensor([history], dtype=torch.int64), torch.tensor(row[None].copy()))[0].argmax()
            for history, row in zip(histories, logits, strict=True)
        ]
        tokens = sampler(logits)
        assert tokens.tolist() == [int(row) for row in rows]
        for history, token in zip(histories, tokens, strict=True):
            history.append(int(token))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"logit_bias": {"1": 2.0}}, "logit_bias: expected a mapping of token ids to numbers, found '1'"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias: expected a mapping of token ids to numbers, found -1"),
        ({"logit_bias": {1: 101}}, "logit_bias: token 1: expected a number from -100 to 100, found 101"),
        ({"logit_bias": {1: None}}, "logit_bias: token 1: expected a number from -100 to 100, found None"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: expected at most 1024 token ids, found 1025"),
        ({"suppress_tokens": [1, -2]}, "suppress_tokens: expected token ids, found -2"),
        ({"suppress_tokens": [True]}, "suppress_tokens: expected token ids, found True"),
        ({"suppress_tokens": range(65_537)}, "suppress_tokens: expected at most 65536 token ids, found 65537"),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids: expected sequences of at least one token id"),
        ({"bad_words_ids": [[1], 2]}, "bad_words_ids: expected a list of token ids, found 2"),
        ({"bad_words_ids": [[1]] * 1025}, "bad_words_ids: expected at most 1024 sequences, found 1025"),
    ],
)
def test_what_is_in_a_field_is_checked(fields: dict[str, Any], expected: str) -> None:
    with pytest.raises(DynexportError) as caught:
        Sampling(**fields)
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"logit_bias": {8: 1.0}},
        {"suppress_tokens": [8]},
        {"begin_suppress_tokens": [8]},
        {"bad_words_ids": [[1, 8]]},
    ],
)
def test_ids_are_checked_against_the_vocabulary(fields: dict[str, Any]) -> None:
    expected = f"{next(iter(fields))}: expected token ids 0..7, found 8"
    with pytest.raises(DynexportError, match=expected):
        RowSampler(Sampling(**fields), vocabulary=8)
    with pytest.raises(DynexportError, match=expected):
        choose(np.zeros((1, 8), np.float32), [RowSampler(Sampling(**fields))])
    RowSampler(Sampling(**fields), vocabulary=9)


def of_transformers(sampling: Sampling, eos: list[int], prompt: int) -> Any:
    """Transformers' processors that change logits, in the order in which generate() applies them."""
    found: list[Any] = []
    if sampling.logit_bias:
        found.append(hf.SequenceBiasLogitsProcessor([[[token], bias] for token, bias in sampling.logit_bias.items()]))
    if sampling.repetition_penalty != 1:
        found.append(hf.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.no_repeat_ngram_size:
        found.append(hf.NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size))
    if sampling.bad_words_ids:
        found.append(hf.NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words_ids], eos))
    if sampling.min_new_tokens:
        found.append(hf.MinNewTokensLengthLogitsProcessor(prompt, sampling.min_new_tokens, eos))
    if sampling.suppress_tokens:
        found.append(hf.SuppressTokensLogitsProcessor(sampling.suppress_tokens))
    if sampling.begin_suppress_tokens:
        found.append(hf.SuppressTokensAtBeginLogitsProcessor(sampling.begin_suppress_tokens, prompt))
    return hf.LogitsProcessorList(found)


small_ids = st.integers(0, 7)
samplings = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    logit_bias=st.dictionaries(small_ids, st.sampled_from([-3.0, 0.5, 4.0]), max_size=3),
    no_repeat_ngram_size=st.integers(0, 4),
    bad_words_ids=st.lists(st.lists(small_ids, min_size=1, max_size=3), max_size=4),
    min_new_tokens=st.integers(0, 3),
    suppress_tokens=st.lists(small_ids, max_size=2),
    begin_suppress_tokens=st.lists(small_ids, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(samplings, st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(0, 99))
def test_logits_change_as_in_transformers(sampling: Sampling, prompt: list[int], seed: int) -> None:
    """Ten tokens, of which six steps are forced to be among the first few, so that sequences do come again."""
    eos = [6, 7]
    draws = np.random.default_rng(seed)
    row = RowSampler(sampling, eos=eos)
    row.see_prompt(prompt)
    tokens, process = list(prompt), of_transformers(sampling, eos, len(prompt))
    for _ in range(6):
        logits = draws.normal(0, 2, (1, 10)).astype(np.float32)
        expected = process(torch.tensor([tokens]), torch.tensor(logits)).numpy()
        if row.history is not None:
            np.testing.assert_allclose(row.history.adjusted(logits[0]), expected[0], rtol=1e-6)
        if not np.isfinite(expected.max()):
            with pytest.raises(DynexportError, match="row 0: expected a token that may be generated"):
                choose(logits, [row])
            return
        (choice,) = choose(logits, [row])
        assert choice.token == int(expected.argmax())
        tokens.append(choice.token)


def test_frequency_and_presence_count_what_was_generated() -> None:
    """OpenAI's formula: logit - count * frequency - (count > 0) * presence, after the penalty of repetition."""
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=-0.25, repetition_penalty=2.0)
    row = RowSampler(sampling)
    row.see_prompt([0, 1, 1])
    counts = np.zeros(5)
    logits = np.array([[1.0, -1.0, 3.0, 3.4, 0.0]], np.float32)
    for _ in range(12):
        expected = logits[0].astype(np.float64)
        seen = (counts > 0) | (np.arange(5) < 2)
        expected[seen] = np.where(expected < 0, expected * 2, expected / 2)[seen]
        expected -= counts * 0.5 - 0.25 * (counts > 0)
        (choice,) = choose(logits, [row])
        assert choice.token == int(expected.argmax())
        counts[choice.token] += 1
    assert counts[[2, 3]].min() > 1 and counts[[0, 1, 4]].sum() > 0


def wide(kind: str, size: int = 9001) -> NDArray[np.float32]:
    """A row of logits that is long enough for the fast way: of another kind, the number of tokens in a nucleus."""
    draws = np.random.default_rng(3)
    if kind == "tied":
        return draws.integers(0, 6, size).astype(np.float32)
    row = draws.normal(0, {"flat": 0.1, "normal": 3, "peaked": 2}[kind], size)
    if kind == "peaked":
        row[draws.choice(size, 20, replace=False)] += 12
    row[::7] = -np.inf
    return row.astype(np.float32)


WIDE = ["flat", "normal", "peaked", "tied"]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.95},
    {"top_p": 0.3},  # of flat logits, no few candidates hold this, and none holds the next
    {"top_p": 0.1},
    {"top_p": 1e-6},
    {"top_p": np.nextafter(1, 0)},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_p": 0.9, "min_p": 0.1},
    {"top_k": 40},
    {"top_k": 4000, "top_p": 0.8},
    {"typical_p": 0.9},
    {"temperature": 0.2, "top_p": 0.95},
    {"temperature": 5e-324},
    {"temperature": 1e300, "top_p": 0.5},
]


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_the_fast_way_draws_what_the_definition_does(kind: str, fields: dict[str, Any]) -> None:
    """For numbers all over [0, 1): the token is the definition's, or the number lies within 1e-5 of its edge."""
    row, sampling = wide(kind), Sampling(**{"temperature": 1.0, **fields})
    ids, probabilities = distribution(row, sampling)
    cumulative = probabilities.cumsum() / probabilities.sum()
    edges = [0.0, np.nextafter(1, 0), *np.random.default_rng(5).random(150)]
    for uniform in edges:
        token = draw_one(row, float(row.max()), sampling, uniform)
        place = int(np.searchsorted(ids, token))
        assert place < len(ids) and ids[place] == token and probabilities[place] > 0
        before = cumulative[place - 1] if place else 0.0
        assert before - 1e-5 <= uniform <= cumulative[place] + 1e-5


def test_top_p_keeps_the_lowest_of_equals_in_long_rows() -> None:
    """4,096 tokens of 1/4096 each: float32 sums of them are exact, and so is what is kept."""
    row = np.full(6000, -np.inf, np.float32)
    row[1000:5096] = 2.5
    for top_p, count in [(0.25, 1024), (np.nextafter(0.25, 1), 1025), (1 / 4096, 1), (4095 / 4096, 4095)]:
        sampling = Sampling(temperature=0.7, top_p=top_p)
        drawn = {draw_one(row, 2.5, sampling, uniform) for uniform in np.arange(2 * count) / (2 * count)}
        assert drawn == set(range(1000, 1000 + count))


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 30}, {"top_p": 0.9, "min_p": 0.05}])
def test_draws_of_long_rows_follow_the_distribution(fields: dict[str, Any]) -> None:
    """Chi-square of 4,000 draws, tokens that are expected less than ten times put together."""
    row, sampling = wide("peaked"), Sampling(temperature=1.0, seed=9, **fields)
    ids, probabilities = distribution(row, sampling)
    expected = np.zeros(row.size)
    expected[ids] = probabilities / probabilities.sum() * 4000
    (state,) = rows = [RowSampler(sampling)]
    found = np.bincount([choose(row[None], rows)[0].token for _ in range(4000)], minlength=row.size)
    assert found[expected == 0].sum() == 0 and state is rows[0]
    often = expected >= 10
    pairs = [(found[often], expected[often])]
    if expected[~often].sum() >= 10:
        pairs.append((found[~often].sum()[None], expected[~often].sum()[None]))
    observed, wanted = (np.concatenate(values) for values in zip(*pairs, strict=True))
    wanted = wanted * observed.sum() / wanted.sum()
    freedom = len(observed) - 1
    # Wilson and Hilferty: the cube root of chi-square / freedom is nearly normal.
    cube = (((observed - wanted) ** 2 / wanted).sum() / freedom) ** (1 / 3)
    assert (cube - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom)) < 4


def test_rows_of_a_batch_have_their_own_options() -> None:
    logits = np.random.default_rng(2).normal(0, 3, (6, 5000)).astype(np.float32)
    options = [
        Sampling(),
        Sampling(temperature=1.0, seed=4),
        Sampling(temperature=0.7, top_p=0.9, seed=4, logprobs=2),
        Sampling(repetition_penalty=1.3, frequency_penalty=1.0),
        Sampling(temperature=1.5, top_k=9, seed=4, presence_penalty=1.0),
        Sampling(logprobs=0),
    ]

    def rows() -> list[RowSampler]:
        found = [RowSampler(sampling, seed_index=index) for index, sampling in enumerate(options)]
        for row in found:
            row.see_prompt([1, 2, 3])
        return found

    together, alone = rows(), rows()
    for _ in range(5):
        choices = choose(logits, together)
        assert choices == [choose(logits[at : at + 1], [alone[at]])[0] for at in range(6)]
        assert choices[0] == Choice(int(logits[0].argmax())) and len(choices[2].top) == 2


def test_a_row_draws_what_the_row_of_a_batch_draws() -> None:
    """``seed_index`` i is row i of a Sampler: numpy's SeedSequence(seed).spawn(rows)[i], as it always was."""
    logits = np.zeros((3, 1000), np.float32)
    sampling = Sampling(temperature=1.0, seed=11)
    rows = [RowSampler(sampling, seed_index=index) for index in range(3)]
    sampler = Sampler(sampling, 3)
    generators = [np.random.default_rng(seed) for seed in np.random.SeedSequence(11).spawn(3)]
    for _ in range(4):
        expected = [int(generator.random() * 1000) for generator in generators]
        assert [choice.token for choice in choose(logits, rows)] == sampler(logits).tolist() == expected


@pytest.mark.parametrize("size", [30, 5001])
def test_logprobs_are_those_of_the_model(size: int) -> None:
    """Whatever changes the choice, they are log_softmax of the logits as they came."""
    logits = np.random.default_rng(1).normal(0, 4, (2, size)).astype(np.float32)
    logits[1, [4, 9, 20]] = logits[1].max() + 1  # of equals the lowest ids first
    expected = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1).numpy()
    fields: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "seed": 1, "logit_bias": {7: 50.0}}
    rows = [RowSampler(Sampling(logprobs=count, **fields)) for count in (0, 20)]
    none, twenty = choose(logits, rows)
    assert none.token == twenty.token == 7 and none.top == ()
    assert none.logprob == pytest.approx(expected[0, 7], abs=1e-5)
    assert twenty.logprob == pytest.approx(expected[1, 7], abs=1e-5)
    ids = [token for token, _ in twenty.top]
    assert ids == np.argsort(-logits[1], kind="stable")[:20].tolist() and ids[:3] == [4, 9, 20]
    np.testing.assert_allclose([value for _, value in twenty.top], expected[1, ids], atol=1e-5)


def test_wrong_arguments_of_a_row() -> None:
    for arguments, expected in (
        ({"sampling": None}, "sampling: expected a Sampling, found None"),
        ({"seed_index": -1}, "seed_index: expected at least 0, found -1"),
        ({"seed_index": 1.5}, "seed_index: expected at least 0, found 1.5"),
    ):
        with pytest.raises(DynexportError, match=expected):
            RowSampler(**{"sampling": Sampling(), **arguments})  # type: ignore[arg-type]
    with pytest.raises(DynexportError, match=r"expected shape \[2, vocab\], found \[1, 4\]"):
        choose(np.zeros((1, 4), np.float32), [RowSampler(Sampling())] * 2)
