"""``dynexport verify``: good, damaged although every hash agrees, and with nothing to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE, copied, dynexport, error_of, replace_file

pytest.importorskip("transformers")

SIZES = ["--new-tokens", 4, "--threads", 1]


@pytest.fixture(scope="module")
def verifiable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with golden vectors, made by the command line."""
    bundle = tmp_path_factory.mktemp("verify") / "bundle"
    ran = dynexport("convert", CONFORMANCE / "skip-2x", "-o", bundle)
    assert ran.code == 0 and "rows of PyTorch's logits" in ran.out
    return bundle


@pytest.fixture
def damaged(verifiable: Path, tmp_path: Path) -> Path:
    """One weight of layer 3 has another value, and the manifest agrees with it."""
    bundle = copied(verifiable, tmp_path / "damaged")
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "model.layers.3.mlp.down_proj.weight")
    place = {entry.key: entry.value for entry in tensor.external_data}
    content = bytearray((bundle / "model.data").read_bytes())
    at = int(place["offset"])
    content[at : at + 4] = np.float32(5).tobytes()
    replace_file(bundle, "model.data", bytes(content))
    return bundle


@pytest.mark.parametrize("against", [[], ["--against", CONFORMANCE / "skip-2x"]], ids=["golden", "model"])
def test_a_good_bundle_passes(verifiable: Path, against: list[object]) -> None:
    ran = dynexport("verify", verifiable, *against, *SIZES, "--json", "-")
    assert ran.code == 0, ran.err
    report = ran.report
    assert report["passed"] is True and report["token_agreement"] == 1
    assert report["max_abs_logit_error"] < 1e-4
    assert all({"name", "passed", "metrics"} <= check.keys() and check["passed"] for check in report["checks"])


@pytest.mark.parametrize("against", [[], ["--against", CONFORMANCE / "skip-2x"]], ids=["golden", "model"])
def test_a_damaged_bundle_fails_with_exit_code_1(damaged: Path, against: list[object], tmp_path: Path) -> None:
    ran = dynexport("verify", damaged, *against, *SIZES, "--json", tmp_path / "report.json")
    assert (ran.code, ran.err) == (1, "")
    assert "FAILED" in ran.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"] is False and not all(check["passed"] for check in report["checks"])
    if against:
        assert "first layer whose output diverges: 3" in ran.out


def test_another_model_is_not_compared(verifiable: Path) -> None:
    assert "expected" in error_of(dynexport("verify", verifiable, "--against", CONFORMANCE / "skip-3x", *SIZES))


def test_nothing_to_compare_with(skip_bundle: Path) -> None:
    assert "--against" in error_of(dynexport("verify", skip_bundle, *SIZES))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--new-tokens", "0"], "expected at least 1, found 0"),
        (["--threads", "0"], "threads: expected 1..256, found 0"),
        (["--against", "nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_bad_arguments(verifiable: Path, arguments: list[str], expected: str) -> None:
    assert expected in error_of(dynexport("verify", verifiable, *arguments))
