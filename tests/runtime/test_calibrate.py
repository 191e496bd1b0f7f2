"""Calibration against the readable reference: rates, flips and thresholds, and what a bundle does with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from hypothesis import given
from hypothesis import strategies as st

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies import strategies
from dynexport.exporter.strategies.calibration import Calibration, CalibrationOptions
from dynexport.exporter.strategies.mod.calibrate import threshold_for, top_k, top_k_count
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.manifest import LayerRouting
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.evaluate import evaluate

CASES = ("mod-router", "mod-predictor-normed", "mod-overflow", "mod-topk", "mod-topk-predictor")
# The routed layers of mod-overflow have room for 11 tokens only.
WINDOWS = {case: (60, 11) if case == "mod-overflow" else (12, 40) for case in CASES}
TOLERANCE = 1e-5


def fields_of(case: str) -> dict[str, Any]:
    return {"prefill": "topk"} if case == "mod-topk-predictor" else {}


def model_of(case: str) -> Path:
    return CONFORMANCE / ("mod-predictor-normed" if case == "mod-topk-predictor" else case)


def text(case: str) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 89, WINDOWS[case])


def calibrate(bundle: Bundle, ids: list[int], **options: Any) -> Calibration:
    return strategies()[bundle.manifest.contract.strategy].calibrate(bundle, ids, CalibrationOptions(**options))


def measure(bundle: Bundle, case: str, **options: Any) -> Calibration:
    rows, window = WINDOWS[case]
    sizes = {"window": window, "max_tokens": rows * window, "threads": 1, **options}
    return calibrate(bundle, text(case).ravel().tolist(), **sizes)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def routed(case: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp(case) / "bundle"
    convert(model_of(case), path, fields=fields_of(case), golden=False)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def found(routed: Bundle, case: str) -> Calibration:
    return measure(routed, case)


def reference_routes(
    bundle: Bundle, case: str, thresholds: dict[int, float] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What PyTorch decides causally: bool chosen, float32 scores and probabilities, each [R, windows, window]."""
    pytest.importorskip("transformers")
    from dynexport.exporter.strategies.mod.reference import ModReference

    contract = bundle.manifest.contract
    assert isinstance(contract, Mod)
    contract = contract.model_copy(update={"thresholds": thresholds or contract.thresholds, "prefill": "causal"})
    reference = ModReference.from_checkpoint(open_checkpoint(model_of(case)), contract=contract, max_length=256)
    rows = text(case).tolist()
    _, routes = reference.routed_logits(rows, [[(0, len(row))] for row in rows])
    chosen, scores, margins = (
        np.stack([getattr(r, part) for r in routes], axis=1) for part in ("chosen", "score", "margin")
    )
    limits = np.array([contract.threshold(layer) for layer in contract.routed_layers], np.float32)[:, None, None]
    return chosen, scores, limits + np.where(chosen, margins, -margins)


def best_of_each_window(scores: np.ndarray, capacity: float) -> np.ndarray:
    chosen = np.zeros(scores.shape, bool)
    for window, row in enumerate(scores):
        ranked = sorted(range(len(row)), key=lambda i: (-row[i], i))
        chosen[window, ranked[: max(1, int(capacity * len(row)))]] = True
    return chosen


def test_rates_and_flips_are_the_references(routed: Bundle, case: str, found: Calibration) -> None:
    chosen, scores, _ = reference_routes(routed, case)
    for layer, ran, score in zip(found.layers, chosen, scores, strict=True):
        assert layer.now.rate == pytest.approx(ran.mean(), abs=1e-9)
        flips = (ran != best_of_each_window(score, 0.25)).mean()
        assert layer.now.flips == pytest.approx(flips, abs=1e-9)
        assert 0.1 < layer.now.rate < 0.9 and flips > 0.01, "the case says something"


def test_thresholds_separate_the_wanted_share(routed: Bundle, case: str, found: Calibration) -> None:
    """Each layer's, from the probabilities that it has when the layers before have their new thresholds."""
    thresholds = {layer.layer: layer.calibrated.threshold for layer in found.layers}
    chosen, scores, probabilities = reference_routes(routed, case, thresholds)
    for layer, ran, score, probability in zip(found.layers, chosen, scores, probabilities, strict=True):
        ranked = np.sort(probability.ravel())[::-1]
        count = round(layer.calibrated.rate * ran.size)
        assert layer.calibrated.rate == pytest.approx(ran.mean(), abs=1e-9)
        assert layer.calibrated.flips == pytest.approx((ran != best_of_each_window(score, 0.25)).mean(), abs=1e-9)
        assert layer.calibrated.threshold == pytest.approx((ranked[count - 1] + ranked[count]) / 2, abs=TOLERANCE)
        ties = np.isclose(probability, layer.calibrated.threshold, atol=0.01).mean()
        assert abs(layer.calibrated.rate - 0.25) <= max(0.5 / ran.size, ties)


def test_a_bundle_with_the_thresholds_runs_what_was_predicted(
    routed: Bundle, case: str, found: Calibration, tmp_path: Path
) -> None:
    convert(model_of(case), tmp_path / "b", fields={**fields_of(case), "thresholds": found.thresholds}, golden=False)
    bundle = Bundle.open(tmp_path / "b")
    again = measure(bundle, case)
    for before, after in zip(found.layers, again.layers, strict=True):
        assert after.now == before.calibrated
        assert after.calibrated.threshold == pytest.approx(before.calibrated.threshold, abs=TOLERANCE)
    executor, rows = Executor(bundle, 1), text(case)
    cache = executor.full_cache(*rows.shape)
    for position in range(rows.shape[1]):
        executor.step(cache, rows[:, position], bundle.manifest.full)
    assert isinstance(bundle.manifest.routing, LayerRouting)
    rates = cache.lengths[list(bundle.manifest.routing.layers)].sum(axis=1) / rows.size
    assert rates == pytest.approx([layer.calibrated.rate for layer in found.layers], abs=1e-9)


def test_neither_the_batch_nor_the_graph_matters(routed: Bundle, case: str, found: Calibration, tmp_path: Path) -> None:
    convert(model_of(case), tmp_path / "b", fields=fields_of(case), static=True, golden=False)
    for other in (measure(routed, case, batch=1), measure(Bundle.open(tmp_path / "b"), case, batch=5)):
        for one, two in zip(found.layers, other.layers, strict=True):
            for part in ("now", "calibrated"):
                assert getattr(two, part).model_dump() == pytest.approx(getattr(one, part).model_dump(), abs=TOLERANCE)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("router") / "bundle"
    convert(model_of("mod-router"), path, golden=False)
    return Bundle.open(path)


def test_the_target_is_met_whatever_it_is(router: Bundle) -> None:
    tokens = 12 * 40
    for target in (1 / tokens, 0.125, 0.5, 0.9, 1.0):
        for layer in measure(router, "mod-router", target_rate=target).layers:
            assert layer.calibrated.rate == pytest.approx(target, abs=1 / tokens)
    assert all(layer.calibrated.threshold <= 0 for layer in measure(router, "mod-router", target_rate=1.0).layers)


def test_the_report_says_what_was_measured(router: Bundle) -> None:
    done = measure(router, "mod-router", max_tokens=99)
    assert (done.target_rate, done.tokens, done.window, done.k) == (0.25, 80, 40, 10)
    assert list(done.thresholds) == ["1", "3"]
    assert all(layer.now.threshold == 0.5 for layer in done.layers)


def test_progress_counts_every_pass(router: Bundle) -> None:
    calls: list[tuple[int, int]] = []
    measure(router, "mod-router", batch=8, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(8, 24), (12, 24), (20, 24), (24, 24)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rate": 0.0}, "target_rate: expected 0 < target_rate <= 1, found 0"),
        ({"target_rate": 1.01}, "target_rate: expected 0 < target_rate <= 1, found 1.01"),
        ({"target_rate": float("nan")}, "target_rate: expected 0 < target_rate <= 1, found nan"),
        ({"window": 0}, r"window: expected 1\.\.256, found 0"),
        ({"window": 257}, "window: expected at most 256 tokens, the capacity of a routed layer's cache"),
        ({"window": 100, "max_tokens": 99}, "max_tokens: expected at least one window of 100, found 99"),
        (
            {"window": 250, "max_tokens": 10**6, "ids": [1] * 249},
            "text: expected at least one window of 250 tokens, found 249 tokens",
        ),
        ({"ids": [1] * 39 + [89]}, r"text: expected token ids 0\.\.88, found 89"),
        ({"batch": 0}, "batch: expected at least 1, found 0"),
        ({"threads": 0}, r"threads: expected 1\.\.256, found 0"),
    ],
)
def test_sizes_out_of_range(router: Bundle, options: dict[str, Any], message: str) -> None:
    sizes = {"window": 40, "ids": [1] * 400, "threads": 1, **options}
    with pytest.raises(DynexportError, match=message):
        calibrate(router, sizes.pop("ids"), **sizes)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("dense", {}, "strategy: expected one whose routers have thresholds to calibrate, found dense"),
        ("skip-2x", {}, "strategy: expected one whose routers have thresholds to calibrate, found unified-skip"),
        ("mod-always", {}, "decision.rule: expected router or predictor, found always, which has no threshold"),
        ("mod-predictor-normed", {"thresholds": {3: 1e9}}, "layer 3: expected a predictor's threshold in -1..2"),
        ("mod-router", {"level": "sequence", "gate": "none"}, "level: expected token to calibrate, found sequence"),
        ("mod-router", {"cache": {"capacity": 0.1}}, "window: expected at most 26 tokens, the capacity of a routed"),
    ],
)
def test_bundles_that_cannot_be_calibrated(tmp_path: Path, case: str, fields: dict[str, Any], message: str) -> None:
    convert(CONFORMANCE / case, tmp_path / "b", fields=fields, golden=False)
    with pytest.raises(DynexportError, match=message):
        calibrate(Bundle.open(tmp_path / "b"), [1] * 100, window=40, threads=1)


def test_a_threshold_far_away_does_not_blur_a_router(tmp_path: Path, router: Bundle) -> None:
    convert(CONFORMANCE / "mod-router", tmp_path / "b", fields={"decision": {"threshold": 1e9}}, golden=False)
    far, near = measure(Bundle.open(tmp_path / "b"), "mod-router"), measure(router, "mod-router")
    assert [layer.now.rate for layer in far.layers] == [0, 0]
    assert [layer.calibrated for layer in far.layers] == [layer.calibrated for layer in near.layers]


def test_the_depth_of_an_evaluation_is_what_its_tokens_ran(router: Bundle) -> None:
    rows, prompt = text("mod-router"), 7
    sizes = {"window": rows.shape[1], "prompt_tokens": prompt, "max_tokens": rows.size, "threads": 1}
    (result,) = evaluate(router, rows.ravel().tolist(), depths=[router.depth(None)], **sizes)
    chosen, _, _ = reference_routes(router, "mod-router")
    assert (result.name, result.layers) == ("routed", 4)
    assert result.depth == pytest.approx(2 + chosen[:, :, prompt:-1].sum(axis=0).mean(), abs=1e-9)


def test_a_window_without_steps_has_no_depth(router: Bundle) -> None:
    sizes = {"window": 8, "prompt_tokens": 7, "max_tokens": 8, "threads": 1}
    (result,) = evaluate(router, [1] * 8, depths=[router.depth(None)], **sizes)
    assert np.isnan(result.depth) and np.isfinite(result.perplexity)


PROBABILITIES = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40)


@given(PROBABILITIES, st.floats(0.001, 1), st.sampled_from([">", ">="]))
def test_a_threshold_is_as_near_as_ties_allow(values: list[float], rate: float, comparison: str) -> None:
    probabilities = np.array(values, np.float32)
    threshold = threshold_for(probabilities, rate, comparison)
    assert threshold == float(str(np.float32(threshold)))
    passing = probabilities > np.float32(threshold) if comparison == ">" else probabilities >= np.float32(threshold)
    possible = [int((probabilities >= value).sum()) for value in probabilities]
    best = min(abs(count - rate * len(values)) for count in possible)
    assert abs(int(passing.sum()) - rate * len(values)) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("comparison", [">", ">="])
def test_thresholds_between_neighbours_of_float32(comparison: str) -> None:
    low = np.float32(0.3)
    high = np.nextafter(low, np.float32(1))
    for values in ([low, high], [high, np.nextafter(high, np.float32(1))]):
        threshold = np.float32(threshold_for(np.array(values), 0.5, comparison))
        passing = values > threshold if comparison == ">" else values >= threshold
        assert passing.tolist() == [False, True]


def test_a_threshold_lies_in_the_middle() -> None:
    probabilities = np.array([0.9, 0.2, 0.6, 0.4], np.float32)
    assert threshold_for(probabilities, 0.5, ">") == pytest.approx(0.5)
    assert threshold_for(np.full(7, 0.25, np.float32), 0.1, ">") == -0.375, "all are equal: all run"


def test_top_k_takes_the_lower_position_on_ties() -> None:
    contract = Mod(routed_layers=(0,), capacity=0.4)
    scores = np.array([[1, 2, 2, 2, -np.inf], [0, 0, 0, 0, 0], [5, 4, 3, 2, 1]], np.float32)
    assert np.argwhere(top_k(contract, scores))[:, 1].tolist() == [1, 2, 0, 1, 0, 1]
    long = np.arange(100, dtype=np.float32)[None] % 2
    assert np.flatnonzero(top_k(contract, long)[0]).tolist() == list(range(1, 80, 2))


@pytest.mark.parametrize(
    ("capacity", "rounding", "tokens", "expected"),
    [
        (0.29, "floor", 100, 29),
        (0.07, "ceil", 100, 7),
        (0.125, "floor", 7, 1),
        (0.125, "ceil", 9, 2),
        (1.0, "ceil", 3, 3),
    ],
)
def test_k_is_exact(capacity: float, rounding: Any, tokens: int, expected: int) -> None:
    assert top_k_count(Mod(routed_layers=(0,), capacity=capacity, rounding=rounding), tokens) == expected
