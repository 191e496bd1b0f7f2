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

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.filters import distribution
from dynexport.runtime.generation.sampler import Sampler
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


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.125, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 30.0])
def test_the_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers").generation.logits_process
    rows = np.random.default_rng(8).normal(0, 3, (4, 200)).astype(np.float32)
    rows[1, ::3] = -np.inf
    rows[2, :] = np.where(np.arange(200) < 8, 1.5, -np.inf)  # one eighth each: top_p is met exactly
    told = [warpers.TemperatureLogitsWarper(temperature)]
    told += [warpers.TopKLogitsWarper(top_k)] if top_k else []
    told += [warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = torch.tensor(rows, dtype=torch.float64)
    for warper in told:
        scores = warper(None, scores)
    expected = scores.softmax(-1).numpy()
    for index, row in enumerate(rows):
        ids, probabilities = distribution(row, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
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
