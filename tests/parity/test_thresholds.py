"""Judgement: near-ties, damaged figures, small samples, and limits that are consistent in themselves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from dynexport.exporter.parity.metrics import Metrics, compare_logits
from dynexport.exporter.parity.thresholds import LIMITS, TENSORRT_LIMITS, Limits, PrecisionLimits, judge

FLOAT32 = LIMITS["fp32"].full
WEIGHTS_ROUNDED = TENSORRT_LIMITS["int8"].full


def metrics(margins: list[float] | None = None, **changed: float | None) -> Metrics:
    """Figures of 100 positions that are right but for what is given."""
    base: Metrics = {"positions": 100, "max_abs": 1e-4, "spread": 1.0, "mean_kl": 1e-9, "margins": margins or []}
    return base | changed


def test_right_figures_pass() -> None:
    assert judge("reference", metrics(), FLOAT32).failures == ()


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"max_abs": 2e-3}, "max_abs"), ({"mean_kl": 1e-3}, "mean_kl"), ({"max_abs": None}, "max_abs")],
)
def test_each_figure_can_fail(changed: dict[str, float | None], named: str) -> None:
    (failure,) = judge("reference", metrics(None, **changed), FLOAT32).failures
    assert failure.startswith(named)


def test_a_large_spread_allows_a_large_error() -> None:
    assert not judge("reference", metrics(max_abs=9e-3, spread=10.0), FLOAT32).failures
    assert judge("reference", metrics(max_abs=1.1e-2, spread=10.0), FLOAT32).failures


def test_near_tie_is_ambiguous_and_no_failure() -> None:
    verdict = judge("reference", metrics([1.9e-3]), FLOAT32)
    assert (verdict.failures, verdict.ambiguous) == ((), 1)


def test_other_token_beyond_a_near_tie_fails() -> None:
    verdict = judge("reference", metrics([1.9e-3, 2.1e-3]), FLOAT32)
    assert verdict.ambiguous == 1
    assert verdict.failures == ("tokens: expected at most 0 of 99 to differ, found 1",)


def test_rounded_weights_have_no_near_ties_but_a_share_of_other_tokens() -> None:
    assert not judge("reference", metrics([1e-6] * 20, max_abs=1.0), WEIGHTS_ROUNDED).failures
    verdict = judge("reference", metrics([1e-6] * 21, max_abs=1.0), WEIGHTS_ROUNDED)
    assert verdict.failures and not verdict.ambiguous


def test_one_other_token_does_not_fail_a_single_position() -> None:
    assert not judge("reference", metrics([1.0], positions=1), WEIGHTS_ROUNDED).failures
    assert judge("reference", metrics([1.0] * 2, positions=2), WEIGHTS_ROUNDED).failures


@pytest.mark.parametrize("limits", [FLOAT32, WEIGHTS_ROUNDED])
def test_what_is_not_finite_fails_at_any_precision(limits: Limits) -> None:
    reference = np.array([[1, 2]], np.float32)
    damaged = compare_logits([reference], [np.array([[1, np.nan]], np.float32)])
    assert len(judge("reference", damaged, limits).failures) >= 2


@pytest.mark.parametrize("limits", [*LIMITS.values(), *TENSORRT_LIMITS.values()])
def test_limits_never_tighten_with_skipped_layers(limits: PrecisionLimits) -> None:
    for name in ("mean_kl", "layer"):
        assert getattr(limits.skipped, name) >= getattr(limits.full, name)
    assert limits.skipped.allowed_error(1.0) >= limits.full.allowed_error(1.0)


def test_errors_that_are_not_judged_excuse_no_token() -> None:
    limits = dataclasses.replace(FLOAT32, error=None)
    assert (limits.allowed_error(1.0), limits.near_tie(1.0)) == (math.inf, 0)
    assert judge("reference", metrics([1e-9], max_abs=50.0), limits).failures
