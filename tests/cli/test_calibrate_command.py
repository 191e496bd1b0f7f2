"""``dynexport calibrate``, and what the other commands say of a routed bundle, as people type them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Ran, change_manifest, copied, dynexport, error_of, talking_checkpoint

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle

SIZES = ["--window", 32, "--max-tokens", 1024, "--threads", 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("mod") / "a model", "mod-router")


@pytest.fixture(scope="module")
def routed(model: Path) -> Path:
    """Layers 1 and 3 of 4 are routed, with room for 64 of 256 tokens."""
    bundle = model.parent / "bundle"
    convert(model, bundle, fields={"cache": {"capacity": 0.25}}, golden=False)
    return bundle


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text("".join(np.random.default_rng(2).choice(list("abcdefghij klmnopqrst uvw.,ABC"), 2000)))
    return path


def words(ran: Ran) -> str:
    """Standard output of a command that went well without a warning, one space between words."""
    assert (ran.code, ran.err) == (0, "")
    return " ".join(ran.out.replace("│", " ").split())


def test_the_table_and_the_command_that_applies_it(model: Path, routed: Path, text: Path, tmp_path: Path) -> None:
    ran = dynexport("calibrate", routed, "--text", text, *SIZES, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    shown = words(ran)
    assert "text.txt: 1024 tokens in windows of 32, of which top-k chooses 8 each" in shown
    assert "layer ┃ rate now ┃ flips ┃ threshold now ┃ for 25.00% ┃ rate then ┃ flips" in shown
    for row in report["layers"]:
        now, then = row["now"], row["calibrated"]
        assert f"{row['layer']} {now['rate']:.2%} {now['flips']:.2%} 0.5 {then['threshold']:.6g} 25.00%" in shown
    assert report["apply"] == ran.out.splitlines()[-1]
    arguments = [str(tmp_path / "b") if word == "BUNDLE" else word for word in shlex.split(report["apply"])]
    assert arguments[:3] == ["dynexport", "convert", str(model)]
    again = dynexport(*arguments[1:], "--no-golden")
    assert again.code == 0
    contract = Bundle.open(tmp_path / "b").manifest.contract
    assert contract.model_dump(mode="json")["thresholds"] == report["thresholds"]
    after = dynexport("calibrate", tmp_path / "b", "--text", text, *SIZES, "--json", "-").report
    assert [row["now"] for row in after["layers"]] == [row["calibrated"] for row in report["layers"]]


def test_json_on_standard_output_is_alone_there(routed: Path, text: Path) -> None:
    ran = dynexport("calibrate", routed, "--text", text, *SIZES, "--target-rate", 0.125, "--batch", 3, "--json", "-")
    assert ran.code == 0 and "rate then" in ran.err
    report = ran.report
    assert (report["target_rate"], report["tokens"], report["window"], report["k"]) == (0.125, 1024, 32, 8)
    assert list(report["thresholds"]) == ["1", "3"]
    assert all(row["calibrated"]["rate"] == pytest.approx(0.125, abs=0.002) for row in report["layers"])


def test_an_imported_model_is_imported_again(routed: Path, text: Path, tmp_path: Path) -> None:
    bundle = copied(routed, tmp_path / "b")
    change_manifest(bundle, lambda fields: fields["source"].update(importer="astramind"))
    apply = dynexport("calibrate", bundle, "--text", text, *SIZES, "--json", "-").report["apply"]
    assert shlex.split(apply)[3:6] == ["--import", "astramind", "--set"]


BAD: dict[str, tuple[list[Any], str]] = {
    "target 0": (["--target-rate", 0], "target_rate: expected 0 < target_rate <= 1, found 0"),
    "target above 1": (["--target-rate", 1.5], "target_rate: expected 0 < target_rate <= 1, found 1.5"),
    "target nan": (["--target-rate", "nan"], "target_rate: expected 0 < target_rate <= 1, found nan"),
    "target that is a word": (["--target-rate", "few"], "'few' is not a valid float"),
    "window over the routed cache": (
        ["--window", 65],
        "window: expected at most 64 tokens, the capacity of a routed layer's",
    ),
    "no window": (["--window", 0], "window: expected 1..64, found 0"),
    "batch 0": (["--batch", 0], "batch: expected at least 1, found 0"),
    "fewer tokens than a window": (["--max-tokens", 31], "max_tokens: expected at least one window of 32, found 31"),
    "threads 0": (["--threads", 0], "threads: expected 1..256, found 0"),
    "no text": (["--text", "nowhere.txt"], "nowhere.txt: expected a text file, found none"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_arguments(routed: Path, text: Path, arguments: list[Any], expected: str) -> None:
    assert expected in error_of(dynexport("calibrate", routed, "--text", text, *SIZES, *arguments))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"too short", "text: expected at least one window of 32 tokens, found 9 tokens"),
        (b"\xff" * 99, "expected UTF-8 text, found invalid"),
    ],
)
def test_bad_texts(routed: Path, tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "text").write_bytes(content)
    assert expected in error_of(dynexport("calibrate", routed, "--text", tmp_path / "text", *SIZES))


def test_bundles_that_cannot_be_calibrated(
    model: Path, text: Path, skip_bundle: Path, dense_bundle: Path, tmp_path: Path
) -> None:
    arguments = ["--text", text, *SIZES]
    refusal = error_of(dynexport("calibrate", skip_bundle, *arguments))
    assert "strategy: expected one whose routers have thresholds" in refusal
    assert "the bundle has no tokenizer" in error_of(dynexport("calibrate", dense_bundle, *arguments))
    convert(model, tmp_path / "b", fields={"decision": {"rule": "always"}}, golden=False)
    message = error_of(dynexport("calibrate", tmp_path / "b", *arguments))
    assert "found always, which has no threshold; convert again with --set decision.rule=router" in message
    assert "expected a bundle with a manifest.json" in error_of(dynexport("calibrate", tmp_path, *arguments))


def test_inspect_shows_the_routing_and_a_routed_cache(routed: Path) -> None:
    shown = words(dynexport("inspect", routed))
    for expected in (
        "routed layers 1, 3 (2 of 4)",
        "capacity 0.25 of the tokens, rounded by floor",
        "decision router, probability > 0.5",
        "prompts routed by the same rule",
        # Two layers of 256 slots and two of 64 and one for what is not counted, 128 bytes each.
        "cache 82.2 KB for a full context, 0.63x of full depth's; 64 entries in a routed layer, overflow: residual",
        "caches of layer 0 and of routed layer 1; the others alike",
        "past_key_values.0.key input float B x 2 x M x 8",
        "past_key_values.1.key input float B x 2 x M_routed x 8",
    ):
        assert expected in shown
    assert "past_key_values.2.key" not in shown and "past_key_values.3.key" not in shown


def test_the_report_of_inspect(routed: Path, dense_bundle: Path) -> None:
    report = dynexport("inspect", routed, "--json", "-").report
    assert (report["cache_bytes"], report["cache_share"]) == (2 * (256 + 65) * 128, (256 + 65) / 512)
    found = {
        "kind": "layers",
        "layers": [1, 3],
        "overflow": "residual",
        "parts": ["layer"],
        "span": 1,
        "skipped_kv": "none",
    }
    assert report["routing"] == found
    assert [(cache["most"], cache["slack"]) for cache in report["caches"]] == [(None, 0), (64, 1)] * 2
    assert report["importer"] is None
    report = dynexport("inspect", dense_bundle, "--json", "-").report
    assert (report["cache_share"], report["routing"]) == (1.0, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"decision": {"rule": "always"}}, "decision always: every token runs"),
        ({"thresholds": {1: 0.25}}, "decision router, probability > 0.25 in layer 1, 0.5 in layer 3"),
        (
            {"prefill": "topk", "decision": {"comparison": ">="}},
            "router, probability >= 0.5 prompts top-k: the capacity's",
        ),
        (
            {"cache": {"capacity": 0.5, "overflow": "error"}},
            "0.75x of full depth's; 128 entries in a routed layer, overflow: error",
        ),
    ],
)
def test_the_summary_of_convert(model: Path, tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    settings = [word for name, value in fields.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    ran = dynexport("convert", model, "--no-golden", "-o", tmp_path / "b", *settings)
    assert ran.code == 0 and expected in " ".join(ran.out.replace("│", " ").split())
    (warning,) = ran.err.splitlines()
    assert warning.startswith("warning: end tokens: answers in a chat also end at '<|im_end|>'")


def test_eval_has_one_row_with_the_depth_that_was_realised(routed: Path, text: Path, skip_bundle: Path) -> None:
    arguments = ["--text", text, "--prompt-tokens", 4, *SIZES]
    ran = dynexport("eval", routed, *arguments, "--json", "-")
    (row,) = ran.report["results"]
    assert (row["name"], row["layers"]) == ("routed", 4) and 2 < row["depth"] < 4
    assert f"routed │ 4 of 4 │ {row['depth']:.2f}" in " ".join(ran.err.split()) and "against" not in ran.err
    results = dynexport("eval", skip_bundle, *arguments, "--json", "-").report["results"]
    assert [(row["name"], row["depth"]) for row in results] == [("full", 8.0), ("2", 4.0)]


def test_eval_without_a_step_shows_no_depth(routed: Path, text: Path) -> None:
    arguments = ["--window", 5, "--prompt-tokens", 4, "--max-tokens", 5, "--threads", 1]
    assert "routed 4 of 4 - " in words(dynexport("eval", routed, "--text", text, *arguments))
