"""How far a verification goes for its cost, what it says it left out, and that what was not compared has failed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bundles import CONFORMANCE, dynexport, error_of
from planting import Planted

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families.architecture import Rotary
from dynexport.exporter.parity import constants, ladder, verification, verify
from dynexport.exporter.parity.comparison import Measurement
from dynexport.exporter.parity.expected import missing
from dynexport.exporter.parity.metrics import compare_bits, compare_logits, compare_routes
from dynexport.exporter.parity.reach import (
    BUDGET,
    COMPETING,
    affordable,
    edges,
    golden_long_row,
    long_row,
    not_reached,
)
from dynexport.exporter.parity.report import Check, Report
from dynexport.exporter.parity.thresholds import LIMITS, judge, judge_routes, limits_of
from dynexport.exporter.parity.verification import Verification
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies.radial.oracle import RadialOracle
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.manifest import Manifest, TargetName

pytest.importorskip("transformers")
BundleOf = Callable[..., Bundle]


def sized(manifest: Manifest, *, max_length: int, layer_flops: int, layers: int, heads: int) -> Manifest:
    """The manifest of a model of other sizes."""
    model = manifest.model.model_copy(update={"max_length": max_length, "layers": layers, "heads": heads})
    cost = manifest.cost.model_copy(update={"layer_flops": layer_flops})
    return manifest.model_copy(update={"model": model, "cost": cost})


def test_a_small_model_is_run_to_the_end_of_its_context(convert_once: BundleOf) -> None:
    manifest = convert_once("mistral").manifest
    row = long_row(manifest, 3, BUDGET)
    assert row is not None
    assert (row.length, row.prompt, row.positions) == (64, 60, tuple(range(64)))
    assert not not_reached(manifest, row, None, 0)
    assert edges(manifest) == {"the attention window of 5": 6, "the context of 64": 64}


def test_a_larger_one_as_far_as_the_next_edge(convert_once: BundleOf) -> None:
    """The sizes of SmolLM2-135M."""
    manifest = sized(convert_once().manifest, max_length=8192, layer_flops=7077888, layers=30, heads=9)
    row = long_row(manifest, 1, BUDGET)
    assert row is not None and row.length == 1024 + 1 + 16
    assert {1023, 1024, row.length - 1} <= {*row.positions} and len(row.positions) >= 512
    assert not_reached(manifest, row, None, 64) == ("the context of 8192 (rows had up to 1041 tokens)",)
    whole = long_row(manifest, 1, float("inf"))
    assert whole is not None and whole.length == 8192 and not not_reached(manifest, whole, None, 64)
    golden = golden_long_row(manifest)
    assert golden is not None and 300 < golden.length < 512 and len(golden.positions) < 80


def test_a_large_one_not_at_all(convert_once: BundleOf) -> None:
    manifest = sized(convert_once().manifest, max_length=8192, layer_flops=4 * 10**8, layers=32, heads=32)
    assert affordable(manifest, 1, BUDGET) < 96
    assert long_row(manifest, 1, BUDGET) is None
    assert len(not_reached(manifest, None, None, 64)) == 2


def test_attention_scores_fit_into_memory(convert_once: BundleOf) -> None:
    manifest = sized(convert_once().manifest, max_length=1 << 20, layer_flops=1000, layers=1, heads=4)
    assert affordable(manifest, 1, BUDGET) ** 2 * 4 * 12 <= 1 << 30


def test_what_was_not_exercised_is_told(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CONFORMANCE / "dense"
    monkeypatch.setattr(verification, "BUDGET", 1.0)
    bundle = convert_once().path.parent / "reach"
    convert(model, bundle, golden=False)
    short = dynexport("verify", bundle, "--against", model, "--new-tokens", 2, "--threads", 1)
    assert short.code == 0 and "not exercised: the context of 256 (rows had up to 64 tokens); --long goes" in short.out
    assert "1 not exercised, see above" in short.out
    long = dynexport("verify", bundle, "--against", model, "--new-tokens", 2, "--threads", 1, "--long", "--json", "-")
    assert long.code == 0 and long.report["not_exercised"] == []
    assert {
        check["name"]: check["metrics"]["positions"] for check in long.report["checks"] if "long" in check["name"]
    } == {"long/full": 256}
    assert "--long: expected with --against" in error_of(dynexport("verify", bundle, "--long"))


def test_a_check_that_is_not_made_has_failed(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "single_steps", lambda *_: [])
    report = verify(convert_once(), threads=1)
    assert [(check.name, check.failures) for check in report.checks if not check.passed] == [
        ("single_steps", ("expected by the manifest, but nothing was compared",))
    ]
    assert Report.model_validate(report.to_json()).judged_again(LIMITS["fp32"]).passed is False


def test_a_check_of_fewer_positions_has_failed() -> None:
    few = Measurement("prompt/64", "reference", {"positions": 63})
    assert [check.name for check in missing([few], {"prompt/64": 64})] == ["prompt/64/positions"]


def test_nothing_compared_is_no_agreement() -> None:
    nothing = np.zeros((0, 5), np.float32)
    for metrics in (compare_logits([], []), compare_logits([nothing], [nothing])):
        assert judge("reference", metrics, LIMITS["fp32"].full).failures == ("nothing was compared",)
    assert judge("exact", compare_bits([nothing], [nothing]), LIMITS["fp32"].full).failures == ("not identical",)
    assert judge("exact", compare_bits([], []), LIMITS["fp32"].full).failures
    assert judge_routes(compare_routes([], []), LIMITS["fp32"].routes).failures == ("nothing was compared",)


@pytest.mark.parametrize(
    ("case", "overflow", "target"),
    [
        ("mod-router", "residual", "tensorrt"),
        ("mod-router", "error", "onnxruntime"),
        ("mod-topk", "residual", "onnxruntime"),
        ("mod-topk", "error", "tensorrt"),
    ],
)
def test_full_caches(case: str, overflow: str, target: TargetName, tmp_path: Path) -> None:
    """Caches of 7 entries: as many tokens run; where a row may go on, four more are turned away in both layers."""
    fields = {"cache": {"capacity": 0.1, "overflow": overflow}}
    convert(CONFORMANCE / case, tmp_path / "bundle", fields=fields, max_length=64, target=target, golden=False)
    prepared = Verification.prepare(Bundle.open(tmp_path / "bundle"), CONFORMANCE / case, threads=1, new_tokens=2)
    row, (oracle,), tokens = prepared.scope.full, prepared.oracles, list(range(12))
    assert row is not None and row.length == 7 + 4 * (overflow == "residual")
    measured = ladder.full_caches(prepared.executor, oracle, row, tokens)
    checks = {m.name: Check.judged(m, limits_of(target, "fp32")) for m in measured}
    assert all(check.passed for check in checks.values()), checks
    overflows = {check.metrics["overflow"] for check in checks.values() if check.of_routes}
    assert overflows == {2 * 4 * (overflow == "residual")}
    assert ("full_caches/refused" in checks) == (overflow == "error")


def test_the_reference_turns_away_whom_a_single_graph_has_to(tmp_path: Path) -> None:
    model = CONFORMANCE / "radial-noreuse-min"
    convert(model, tmp_path / "bundle", layer_capacity=0.25)
    bundle = Bundle.open(tmp_path / "bundle")
    assert verify(bundle, threads=1).passed, "golden vectors"
    prepared = Verification.prepare(bundle, model, threads=1, new_tokens=2)
    checks = {check.name: Check.judged(check, limits_of("onnxruntime", "fp32")) for check in prepared.checks()}
    assert all(check.passed for check in checks.values()), checks
    turned = checks["routes/prompt/64"].metrics
    assert turned["overflow"] == turned["overflow_reference"] != 0
    assert "chunked_prefill/3" not in checks and "batch_isolation/full" not in checks
    assert COMPETING in not_reached(bundle.manifest, None, None, 0)
    # With room for one more the reference lets another token run, and the check fails.
    contract, weights = bundle.manifest.contract, Weights(open_checkpoint(model), streaming=False)
    assert isinstance(contract, Radial)
    oracle = RadialOracle(weights, contract, 0.27, 64)
    found = ladder.prompts_alone_and_together(prepared.executor, oracle, [list(range(64))], 1)
    assert not all(Check.judged(check, limits_of("onnxruntime", "fp32")).passed for check in found)


def test_rows_are_no_longer_than_caches_where_a_full_one_is_an_error(tmp_path: Path) -> None:
    fields = {"cache": {"capacity": 0.1, "overflow": "error"}}
    convert(CONFORMANCE / "mod-always", tmp_path / "bundle", fields=fields)
    bundle = Bundle.open(tmp_path / "bundle")
    assert verify(bundle, threads=1).passed
    report = verify(bundle, CONFORMANCE / "mod-always", new_tokens=2, threads=1)
    assert report.passed and "the context of 256 (rows had up to 26 tokens)" in report.not_exercised


def test_a_theta_that_was_read_wrong_is_told(convert_once: BundleOf, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = convert_once().manifest
    read = constants.read_architecture(manifest.source.config)
    assert isinstance(read.positions, Rotary) and constants.angle_differences(manifest) == []
    positions = replace(read.positions, inverse_frequencies=tuple(0.99 * f for f in read.positions.inverse_frequencies))
    monkeypatch.setattr(constants, "read_architecture", lambda _: replace(read, positions=positions))
    cos, sin = constants.angle_differences(manifest)
    assert cos.startswith("cos of position 1, channel 0: expected") and sin.startswith("sin of position 1, channel 0")


POOL = [
    ("pool", "model.layers.2.mlp.up_proj.weight", 2),
    ("pool", "model.layers.1.self_attn.qkv_proj.weight", 1),
    ("embedding", "model.embed_tokens.weight", "embedding"),
    ("pool", "model.norm.weight", "head"),
    ("router", "model.radial_router.fc1.weight", "router"),
]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("pool") / "bundle"
    convert(CONFORMANCE / "radial-noreuse-min", output)
    return Bundle.open(output)


@pytest.mark.parametrize(("graph", "weight", "place"), POOL)
def test_the_layer_of_a_graph_set_is_named(
    graph: str, weight: str, place: int | str, pool: Bundle, tmp_path: Path
) -> None:
    copy = Planted(pool, tmp_path / "copy")
    random = np.random.default_rng(0)
    copy.weight(weight, lambda values: np.multiply(values, random.uniform(0.5, 1.5, values.shape), out=values), graph)
    report = verify(copy.bundle(), CONFORMANCE / "radial-noreuse-min", new_tokens=2, threads=1)
    assert report.first_departing_layer == place


def test_wrong_paths_are_the_routers_without_pytorch(pool: Bundle, tmp_path: Path) -> None:
    copy = Planted(pool, tmp_path / "copy")
    copy.weight("model.radial_router.fc1.weight", lambda values: np.negative(values, out=values), "router")
    report = verify(copy.bundle(), threads=1)
    assert report.departure is not None
    assert (report.departure.of, report.departure.first) == ("decisions", "router")
