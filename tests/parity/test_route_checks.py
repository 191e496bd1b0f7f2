"""Decisions of routed layers: what a flip is, how flips are judged, and that wrong routes fail a verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from safetensors.numpy import load_file, save_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity import Report, verify
from dynexport.exporter.parity.golden import read_golden
from dynexport.exporter.parity.metrics import compare_routes
from dynexport.exporter.parity.thresholds import RouteLimits, judge_routes
from dynexport.exporter.reference import RowRoutes
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.execution import checking
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.kv_cache import KvCache

pytest.importorskip("transformers")
LIMITS = RouteLimits(margin=(1e-5, 0.0), agreement=0.9)


def routes(chosen: list[list[int]], margin: float = 0.5, overflow: int = 0) -> RowRoutes:
    decisions = np.array(chosen, bool)
    layers = len(decisions)
    filled = np.full(decisions.shape, margin, np.float32)
    return RowRoutes(decisions, np.zeros(decisions.shape, np.float32), filled, np.full(layers, overflow, np.int64))


def test_the_same_decisions() -> None:
    metrics = compare_routes([routes([[1, 0], [0, 1]])] * 2, [routes([[1, 0], [0, 1]])] * 2)
    assert (metrics["decisions"], metrics["agreement"], metrics["flips"], metrics["share"]) == (8, 1.0, [], 0.5)
    assert not judge_routes(metrics, LIMITS).failures


def test_a_flip_and_what_follows_from_it() -> None:
    """The second layer's later token may differ because of the first; the first layer's earlier one may not."""
    expected = routes([[1, 0, 0], [0, 1, 0]])
    found = routes([[1, 1, 0], [0, 1, 1]])
    metrics = compare_routes([expected], [found])
    assert (metrics["flips"], metrics["followed"]) == ([[0, 0, 1]], 1)
    independent = compare_routes([expected], [routes([[1, 1, 0], [1, 1, 0]])])
    assert independent["flips"] == [[0, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(("margin", "passes"), [(1e-6, True), (1e-3, False)])
def test_flips_are_near_ties_or_failures(margin: float, passes: bool) -> None:
    expected = routes([[1] * 20], margin)
    found = routes([[0] + [1] * 19])
    verdict = judge_routes(compare_routes([expected], [found]), LIMITS)
    assert (not verdict.failures, verdict.ambiguous) == (passes, int(passes))


@pytest.mark.parametrize(("margin", "passes"), [(0.07, True), (0.09, False)])
def test_what_is_near_depends_on_the_scale_of_scores(margin: float, passes: bool) -> None:
    """A share of 0.02 of margins that are 4 on average; those without a second choice have no say."""
    expected, found = routes([[1] * 20], 4.0), routes([[0] + [1] * 19])
    expected.margin[0, :3] = margin, 8.0 - margin, np.inf
    metrics = compare_routes([expected], [found])
    assert metrics["mean_margin"] == pytest.approx(4.0)
    verdict = judge_routes(metrics, RouteLimits(margin=(0.01, 0.02), agreement=0.9))
    assert (not verdict.failures) is passes


def test_too_many_flips_fail_however_near() -> None:
    verdict = judge_routes(compare_routes([routes([[1] * 4], 0.0)], [routes([[0, 1, 1, 0]])]), LIMITS)
    assert "expected 90.0% to be the same, found 50.0%" in verdict.failures[0]


def test_another_overflow_fails() -> None:
    verdict = judge_routes(compare_routes([routes([[1]], overflow=2)], [routes([[1]], overflow=1)]), LIMITS)
    assert verdict.failures == ("overflow: expected 2, found 1",)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("mod") / "bundle"
    convert(CONFORMANCE / "mod-router", path)
    return Bundle.open(path)


def failed(report: Report) -> set[str]:
    return {check.name.split("/")[0] for check in report.checks if not check.passed}


@pytest.mark.parametrize("case", ["mod-router", "mod-predictor-normed", "mod-topk", "mod-overflow", "mod-compact"])
@pytest.mark.parametrize("static", [False, True], ids=["compacted", "padded"])
def test_right_bundles_pass(case: str, static: bool, tmp_path: Path) -> None:
    convert(CONFORMANCE / case, tmp_path / "bundle", static=static)
    bundle = Bundle.open(tmp_path / "bundle")
    for against in (None, CONFORMANCE / case):
        report = verify(bundle, against, new_tokens=6, threads=1)
        assert report.passed, [check.failures for check in report.checks if check.failures]
        assert report.route_agreement == 1.0 and report.route_flips == 0
        names = {check.name for check in report.checks if check.kind == "routes"}
        expected = {"routes/golden/full/33"} if against is None else {"routes/prompt/batch", "routes/greedy/full"}
        assert names >= expected


def with_contract(bundle: Bundle, **fields: Any) -> Bundle:
    """The bundle, said to have been made for another contract than its graph was."""
    contract = Mod.model_validate({**bundle.manifest.contract.model_dump(), **fields})
    return Bundle(bundle.path, bundle.manifest.model_copy(update={"contract": contract}))


def test_another_threshold_fails_in_its_decisions_alone(bundle: Bundle) -> None:
    """With the reference's routes forced, logits are right: the report tells a wrong rule from wrong arithmetic."""
    report = verify(with_contract(bundle, thresholds={1: 0.6}), CONFORMANCE / "mod-router", new_tokens=6, threads=1)
    assert failed(report) == {"routes", "constants"}
    assert report.departure is not None
    assert (report.departure.of, report.departure.first, [*report.departure.errors]) == ("decisions", 1, ["1"])
    assert report.max_abs_logit_error is not None and report.max_abs_logit_error < 1e-4


def test_another_gate_fails_in_its_logits(bundle: Bundle) -> None:
    """The last routed layer's gate decides nothing any more; before it, decisions follow the wrong hidden states."""
    report = verify(with_contract(bundle, gate="none"), CONFORMANCE / "mod-router", new_tokens=6, threads=1)
    assert {"prompt", "greedy", "second_turn"} <= failed(report)
    assert report.first_departing_layer == 1


def test_routes_told_wrong_fail(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that runs other tokens than it says it does."""
    read = DecisionReader.read

    def mistold(self: DecisionReader, results: dict[str, Any], *args: Any) -> Any:
        return read(self, results | {"routes": results["routes"][::-1]}, *args)

    monkeypatch.setattr(DecisionReader, "read", mistold)
    assert "routes" in failed(verify(bundle, threads=1))


def test_other_decisions_in_pieces_fail_in_decisions_alone(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same tokens run, the same comes out."""
    decided = checking._forced

    def none_alone(wish: Any, tokens: int, *args: Any) -> np.ndarray:
        return decided(wish, tokens, *args) * (wish is not None or tokens != 1)

    monkeypatch.setattr(checking, "_forced", none_alone)
    report = verify(bundle, threads=1)
    assert failed(report) == {"routes"}
    own = {check.name for check in report.checks if check.kind == "own_routes" and not check.passed}
    assert own == {"routes/single_steps"}


def test_entries_counted_for_skipped_tokens_fail(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = KvCache.commit

    def every_token(self: KvCache, *args: Any) -> None:
        commit(self, *args)
        self.lengths[:] = self.positions

    monkeypatch.setattr(KvCache, "commit", every_token)
    assert {"golden", "single_steps", "chunked_prefill"} <= failed(verify(bundle, threads=1))


@pytest.mark.parametrize("case", ["mod-router", "radial-step"])
@pytest.mark.parametrize("shape", [(), (3,), (9, 41)])
def test_golden_routes_of_another_shape_are_refused(case: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    convert(CONFORMANCE / case, tmp_path / "bundle")
    path = tmp_path / "bundle" / "golden.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "full.33.score": np.zeros(shape, np.float32)}, path)
    with pytest.raises(DynexportError, match=r"full\.33\.score: expected the shape \[\d, 41\] for this bundle, found"):
        read_golden(path, Manifest.model_validate_json((tmp_path / "bundle" / "manifest.json").read_text()))
