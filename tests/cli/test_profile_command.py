"""``dynexport profile`` as people type it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Ran, change_tensors, checkpoint, dynexport, error_of, talking_checkpoint

from dynexport.runtime import Bundle

SIZES = ["--window", 32, "--max-tokens", 320, "--threads", 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 layers; it declares Unified Skip, which is dense in a prompt."""
    return talking_checkpoint(tmp_path_factory.mktemp("profile") / "a model")


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    path = model.parent / "text.txt"
    path.write_text("".join(np.random.default_rng(2).choice(list("abcdefghij klmnopqrst uvw.,ABC"), 500)))
    return path


def words(ran: Ran) -> str:
    """Standard output of a command that went well without a warning, one space between words."""
    assert (ran.code, ran.err) == (0, "")
    return " ".join(ran.out.replace("│", " ").split())


def test_the_table_and_the_command_that_skips(model: Path, text: Path, tmp_path: Path) -> None:
    ran = dynexport("profile", model, "--text", text, *SIZES, "--budget", 0.5, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    shown = words(ran)
    assert "text.txt: medians over 320 tokens in windows of 32" in shown
    for row in report["layers"]:
        parts = [row["blocks"]["attention"], row["blocks"]["mlp"], row["whole"]]
        figures = " ".join(f"{part[name]['median']:.1%}" for part in parts for name in ("of_input", "of_output"))
        assert f" {row['layer']} {figures} {row['influence']:.4f} {row['skip_order'] + 1} " in shown
    overall = report["all_blocks"]["of_input"]
    assert f"all residual blocks: median R/x {overall['median']:.1%} (10 to 90 %: {overall['p10']:.1%} to" in shown
    for name in ("attention: ", "MLP: ", "whole layers: "):
        assert f"{name}median R/x" in shown
    order = sorted(range(8), key=lambda i: report["layers"][i]["influence"])
    assert report["skipped"] == sorted(order[:4]) and report["kept"] == sorted(order[4:])
    assert "4 of 8 layers kept; skipped (least block influence): " in shown
    assert "This does not measure quality" in shown
    assert report["convert"] == ran.out.splitlines()[-1]
    arguments = [str(tmp_path / "b") if word == "BUNDLE" else word for word in shlex.split(report["convert"])]
    assert arguments[:3] == ["dynexport", "convert", str(model)]
    assert dynexport(*arguments[1:], "--no-golden").code == 0
    assert list(Bundle.open(tmp_path / "b").depth("keep").keep) == report["kept"]


def test_json_on_standard_output_is_alone_there_and_finite(model: Path, text: Path) -> None:
    ran = dynexport("profile", model, "--text", text, *SIZES, "--batch", 3, "--json", "-")
    assert ran.code == 0 and "all residual blocks" in ran.err and "layers stay" not in ran.err
    report = json.loads(ran.out, parse_constant=pytest.fail)
    assert (report["model"], report["text"]) == (str(model), str(text))
    assert (report["tokens"], report["window"], len(report["layers"])) == (320, 32, 8)
    assert "null" not in ran.out and "skipped" not in report
    assert sorted(layer["skip_order"] for layer in report["layers"]) == list(range(8))


@pytest.mark.parametrize(("skip", "said"), [(0, "8 of 8 layers kept; none skipped"), (7, "1 of 8 layers kept")])
def test_skip(model: Path, text: Path, skip: int, said: str) -> None:
    ran = dynexport("profile", model, "--text", text, *SIZES, "--skip", skip, "--json", "-")
    assert said in ran.err and len(ran.report["skipped"]) == skip


def test_pictures_and_the_report_go_to_a_directory(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    directory = tmp_path / "a" / "profile"
    ran = dynexport("profile", model, "--text", text, *SIZES, "--skip", 1, "-o", directory, "--json", "-")
    assert json.loads((directory / "profile.json").read_text()) == ran.report
    for name in ("heatmap.png", "medians.png", "sparsity.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert f"wrote {directory / name}" in ran.err
    assert len(list(directory.iterdir())) == 4


def test_a_tokenizer_from_elsewhere(model: Path, text: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    arguments = ["profile", bare, "--text", text, *SIZES]
    assert "expected a tokenizer.json, found none; name one with --tokenizer" in error_of(dynexport(*arguments))
    own = dynexport("profile", model, "--text", text, *SIZES, "--json", "-").report
    report = dynexport(*arguments, "--tokenizer", model, "--json", "-").report
    assert report["layers"] == own["layers"]


def test_parallel_layers_are_one_block(saved_model: Any, model: Path, text: Path) -> None:
    arguments = ["--tokenizer", model, "--text", text, *SIZES]
    shown = words(dynexport("profile", saved_model("gpt_neox"), *arguments))
    assert "layer R/x R/y 1-cos" in shown.replace("┃ ", "") and "attention" not in shown and "attn" not in shown


BAD: dict[str, tuple[list[Any], str]] = {
    "both budgets": (["--skip", 1, "--budget", 0.5], "expected --skip or --budget, found both"),
    "all layers": (["--skip", 8], "skip: expected 0..7 of 8 layers, found 8"),
    "no layer": (["--budget", 0.1], "budget: expected at least 1 of 8 layers to stay"),
    "over all": (["--budget", 1.1], "budget: expected a share of the layers, over 0 and up to 1, found 1.1"),
    "not a number": (["--budget", "half"], "'half' is not a valid float"),
    "window over the context": (["--window", 257], "window: expected 1..256 tokens, found 257"),
    "batch 0": (["--batch", 0], "batch: expected at least 1, found 0"),
    "fewer tokens than a window": (["--max-tokens", 31], "max_tokens: expected at least one window of 32, found 31"),
    "threads 0": (["--threads", 0], "threads: expected 1..256, found 0"),
    "no text": (["--text", "nowhere.txt"], "nowhere.txt: expected a text file, found none"),
}


@pytest.mark.parametrize(("arguments", "expected"), BAD.values(), ids=BAD)
def test_bad_arguments(model: Path, text: Path, arguments: list[Any], expected: str) -> None:
    assert expected in error_of(dynexport("profile", model, "--text", text, *SIZES, *arguments))


def test_a_model_that_is_not_there(text: Path) -> None:
    assert "no such file or directory" in error_of(dynexport("profile", "nowhere", "--text", text))


def test_a_text_that_is_too_short(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("too short")
    message = error_of(dynexport("profile", model, "--text", tmp_path / "text", *SIZES))
    assert "text: expected at least one window of 32 tokens, found 9 tokens" in message


def test_a_routed_checkpoint_is_refused_with_the_reason(text: Path, tmp_path: Path) -> None:
    routed = talking_checkpoint(tmp_path / "mod", "mod-router")
    message = error_of(dynexport("profile", routed, "--text", text, *SIZES))
    assert "strategy: expected a dense checkpoint, found 'mod'" in message and "run BUNDLE --trace" in message


def test_a_directory_that_cannot_be_written_is_told_before_work(text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "taken").write_text("")
    message = error_of(dynexport("profile", "nowhere", "--text", text, "-o", tmp_path / "taken"))
    assert f"-o {tmp_path / 'taken'}: expected a directory to write, found Not a directory" in message


@pytest.mark.parametrize(
    ("module", "options", "extra"),
    [("torch", [], "torch"), ("transformers", [], "torch"), ("matplotlib", ["-o", "d"], "pictures")],
)
def test_packages_that_are_not_there(
    model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, module: str, options: list[str], extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    message = error_of(dynexport("profile", model, "--text", text, *SIZES, *options))
    assert f"{module} is needed to" in message and f"pip install 'dynexport[{extra}]'" in message


def test_weights_that_are_not_finite(text: Path, tmp_path: Path) -> None:
    damaged = talking_checkpoint(tmp_path / "damaged")

    def damage(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.3.mlp.down_proj.weight"][0, 0] = np.inf

    change_tensors(damaged, damage)
    message = error_of(dynexport("profile", damaged, "--text", text, *SIZES))
    assert "layer 3: expected finite hidden states" in message


def test_a_family_that_nobody_knows(text: Path, tmp_path: Path) -> None:
    strange = checkpoint(tmp_path / "strange", model_type="strange")
    assert "model_type: expected one of" in error_of(dynexport("profile", strange, "--text", text, *SIZES, "--skip", 1))
