"""Figures against figures computed by hand, and the properties that they must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dynexport.exporter.parity.metrics import compare_bits, compare_logits, number, relative_error

ROWS = arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


def floats(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32)


def test_figures_by_hand() -> None:
    reference = [floats((0, 2), (4, 0)), floats((1, 3))]
    candidate = [floats((0, 2.5), (1, 1.5)), floats((1, 3))]
    found = compare_logits(reference, candidate)
    assert found["positions"] == 3
    assert found["max_abs"] == 3
    assert found["mean_abs"] == pytest.approx((0.25 + 2.25 + 0) / 3)
    assert found["spread"] == pytest.approx((1 + 2 + 1) / 3)
    assert found["max_relative"] == pytest.approx(3 / (4 / 3))
    assert (found["agreed"], found["top1_agreement"]) == (2, pytest.approx(2 / 3))
    assert found["disagreements"] == [[0, 1]]
    assert found["margins"] == [4]
    assert found["first_divergence"] == [1, -1]


def test_divergence_by_hand() -> None:
    log = math.log
    reference, candidate = floats((log(3), 0)), floats((0, 0))
    expected = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    found = compare_logits([reference, reference], [candidate, reference])
    assert found["max_kl"] == pytest.approx(expected, rel=1e-6)
    assert found["mean_kl"] == pytest.approx(expected / 2, rel=1e-6)


def test_margin_is_to_the_token_that_was_chosen() -> None:
    """The second best being near does not excuse a third."""
    found = compare_logits([floats((5, 4.99, 1))], [floats((0, 0, 1))])
    assert found["margins"] == [4]


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(damage: float) -> None:
    found = compare_logits([floats((1, 2))], [floats((1, damage))])
    assert found["max_abs"] == found["mean_kl"] == found["max_relative"] == math.inf


def test_equal_logits_without_any_spread() -> None:
    found = compare_logits([floats((2, 2))], [floats((2, 2))])
    assert (found["max_relative"], found["mean_kl"]) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_nothing_differs_from_itself(logits: np.ndarray) -> None:
    found = compare_logits([logits], [logits])
    assert found["max_abs"] == found["mean_abs"] == found["mean_kl"] == 0
    assert found["top1_agreement"] == 1
    assert compare_bits([logits], [logits]) == {"identical": True, "positions": 3, "max_abs": 0.0}


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS)
def test_bounds(reference: np.ndarray, candidate: np.ndarray) -> None:
    found = compare_logits([reference], [candidate])
    assert number(found["max_kl"]) >= number(found["mean_kl"]) >= 0
    assert number(found["max_abs"]) >= number(found["mean_abs"]) >= 0
    # Errors of e move a distribution by no more than 2e.
    assert number(found["max_kl"]) <= 2 * number(found["max_abs"]) + 1e-9
    margins = found["margins"]
    assert isinstance(margins, list) and all(
        0 <= margin <= 2 * number(found["max_abs"]) for margin in map(number, margins)
    )


@settings(max_examples=40, deadline=None)
@given(ROWS, ROWS)
def test_rows_together_are_what_they_are_alone(reference: np.ndarray, candidate: np.ndarray) -> None:
    together = compare_logits([reference], [candidate])
    alone = [compare_logits([r[None]], [c[None]]) for r, c in zip(reference, candidate, strict=True)]
    assert number(together["mean_kl"]) == pytest.approx(np.mean([number(row["mean_kl"]) for row in alone]))
    assert together["max_abs"] == max(number(row["max_abs"]) for row in alone)
    assert together["agreed"] == sum(int(number(row["agreed"])) for row in alone)


def test_bits_tell_what_figures_do_not() -> None:
    one = floats((1, 2))
    assert compare_bits([one], [np.nextafter(one, np.float32(9))])["identical"] is False


def test_relative_error_is_that_of_the_worst_vector() -> None:
    reference, candidate = floats((3, 4), (100, 0)), floats((3, 5), (101, 0))
    assert relative_error(reference, candidate) == pytest.approx(1 / 5)
    assert relative_error(reference, floats((np.nan, 4), (100, 0))) == math.inf
