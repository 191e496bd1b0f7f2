"""`verify` and `eval` of bundles for TensorRT, run by ONNX Runtime: strategies, precisions, and sizes of engines."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from bundles import CONFORMANCE, dynexport

pytest.importorskip("transformers")

SAMPLES = Path(__file__).parents[2] / "samples" / "training" / "checkpoints"
# The smallest models where rounding leaves random weights their likeliest token, trained ones where it does not.
CASES = [
    *((CONFORMANCE / "dense", precision) for precision in ("fp32", "fp16", "int8", "int4")),
    (CONFORMANCE / "skip-2x", "fp32"),
    *((SAMPLES / "skip-2", precision) for precision in ("fp16", "int8", "int4")),
    *((CONFORMANCE / "mod-router", precision) for precision in ("fp32", "int8")),
    *((SAMPLES / "mod", precision) for precision in ("fp16", "int4")),
]
SIZES = ("--new-tokens", 4, "--threads", 1, "--json", "-")
BundleOf = Callable[..., Path]


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> BundleOf:
    @cache
    def make(model: Path, *options: object) -> Path:
        path = tmp_path_factory.mktemp("tensorrt") / "bundle"
        ran = dynexport("convert", model, "-o", path, "--target", "tensorrt", "--no-golden", *options)
        assert ran.code == 0, ran.err
        return path

    return make


@pytest.mark.parametrize(("model", "precision"), CASES, ids=lambda part: getattr(part, "name", part))
def test_bundles_agree_with_pytorch(model: Path, precision: str, bundle_of: BundleOf) -> None:
    ran = dynexport("verify", bundle_of(model, "--precision", precision), "--against", model, *SIZES)
    assert ran.code == 0, ran.out
    checks = {check["name"] for check in ran.report["checks"]}
    assert {"prompt/batch", "greedy/full", "single_steps", "neighbours/full"} <= checks
    assert ("routes/prompt/batch" in checks) == model.name.startswith("mod")
    assert ("greedy/2" in checks) == model.name.startswith("skip")


def test_a_batch_has_no_more_rows_than_engines(bundle_of: BundleOf) -> None:
    for rows in (1, 2):
        bundle = bundle_of(CONFORMANCE / "mod-router", "--max-batch", rows)
        ran = dynexport("verify", bundle, "--against", CONFORMANCE / "mod-router", *SIZES)
        assert ran.code == 0, ran.err or ran.out
        sizes = {check["name"]: check["metrics"].get("positions") for check in ran.report["checks"]}
        assert sizes["prompt/batch"] == sum((2, 5)[:rows])


def test_prompts_that_cannot_be_cut_are_no_longer_than_engines_take(bundle_of: BundleOf) -> None:
    bundle = bundle_of(CONFORMANCE / "mod-topk", "--max-prompt", 9)
    ran = dynexport("verify", bundle, "--against", CONFORMANCE / "mod-topk", *SIZES)
    assert ran.code == 0, ran.err or ran.out
    assert {"prompt/2", "prompt/5", "prompt/9"} <= {check["name"] for check in ran.report["checks"]}


def test_bfloat16_is_refused_in_a_line(bundle_of: BundleOf) -> None:
    bundle = bundle_of(CONFORMANCE / "dense", "--precision", "bf16")
    ran = dynexport("verify", bundle, "--against", CONFORMANCE / "dense", *SIZES)
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert "bfloat16" in ran.err


def test_perplexity_is_that_of_the_plain_graphs(bundle_of: BundleOf, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Is this a dagger which I see before me, the handle toward my hand? " * 12)
    plain = tmp_path / "plain"
    assert dynexport("convert", SAMPLES / "mod", "-o", plain, "--no-golden").code == 0
    found = []
    # Engines for two rows: fewer windows run together.
    for bundle in (plain, bundle_of(SAMPLES / "mod", "--precision", "fp32", "--max-batch", 2)):
        options = ("--window", 48, "--prompt-tokens", 16, "--max-tokens", 144, "--threads", 1, "--json", "-")
        ran = dynexport("eval", bundle, "--text", text, *options)
        assert ran.code == 0, ran.err
        (result,) = ran.report["results"]
        found.append((result["perplexity"], result["depth"]))
    assert found[1] == pytest.approx(found[0], rel=1e-4)
