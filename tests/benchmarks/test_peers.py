"""The comparison with other runtimes, on fake ones: scripts that print what a measurement prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peers
import peers_list
import peers_prepare
import peers_table
import pytest
from bundles import copied, skip_bundle  # noqa: F401 - a fixture

# Seconds of prompts and steps that each fake reports, by the model's name; "broken" crashes, "mute" prints nothing.
FAKE = """
import json, sys
import numpy as np
engine, model = sys.argv[2:4]
name = model.rpartition("/")[2]
if name == "broken": sys.exit("it ran out of memory")
if "--logits" in sys.argv:
    ids, into = sys.argv[sys.argv.index("--logits") + 1:][:2]
    logits = np.zeros((*np.load(ids).shape, 300), np.float32)
    logits[..., 0] = len(name)
    np.save(into, logits)
elif name != "mute":
    scale = {"bundle": 1, "slow": 3, "fast": 0.5}[name]
    times = {"prefill": [0.4 * scale, 0.2 * scale], "steps": [0.01 * scale] * 3 + [0.5]}
    others = {"others_prefill": 0.01, "others_decode": 0.02}
    print("a library's greeting")
    print(json.dumps({"versions": {engine: "1.2"}, "load": 0.5, "first": 1, **times, **others, "peak": 3_000_000}))
"""


def command(home: Path, name: str) -> list[str]:
    (home / "fake.py").write_text(FAKE)
    return [sys.executable, str(home / "fake.py"), "-", "some", f"{home}/{name}"]


def row(number: int, seconds: float, others: float | None = 0.0, **more: Any) -> dict[str, Any]:
    shares = {"others_prefill": others, "others_decode": others}
    return {
        "label": "a",
        "round": number,
        "shape": "256x1",
        "prefill": [10 * seconds, 20 * seconds],
        "steps": [seconds] * 4,
        "load": 1.0,
        "peak": 5e6,
        "versions": {"x": "1"},
        **shares,
        **more,
    }


def test_measurements_take_turns_and_a_crash_is_said(tmp_path: Path) -> None:
    commands = {name: command(tmp_path, name) for name in ("bundle", "broken", "mute")}
    rows = peers.in_turn(commands, range(2), "256x1")
    assert [(each["label"], each["round"]) for each in rows] == [(n, r) for r in range(2) for n in commands]
    assert rows[0]["prefill"] == [0.4, 0.2] and "error" not in rows[0]
    assert rows[1]["error"] == "exit code 1: it ran out of memory"
    assert "error" in rows[2]
    absent = peers.measure([str(tmp_path / "none"), "x"], "gone")
    assert absent["error"].endswith("No such file or directory; run with --install")


def test_ratios_are_paired_within_rounds() -> None:
    """The second round is twice as slow for both: the ratio of medians would not be 3."""
    base = [row(0, 0.01), row(1, 0.02), row(2, 0.02), row(3, 0.5, others=0.5)]
    mine = [row(0, 0.03), row(1, 0.06), row(2, 0.02, others=0.5), row(3, 0.9)]
    found = peers_table.figures(mine, base, quiet=0.1)
    assert found["decode_ratio"] == pytest.approx(3) and found["prefill_ratio"] == pytest.approx(3)
    assert found["decode_milliseconds"] == pytest.approx(60) and found["prefill_milliseconds"] == pytest.approx(600)
    assert (found["decode_rounds"], found["rounds"], found["others_share"]) == (3, 4, 0.5)
    alone = peers_table.figures(mine[:1], [], quiet=0.1)
    assert (alone["decode_ratio"], alone["decode_milliseconds"]) == (None, pytest.approx(30))
    assert peers_table.figures([row(0, 1.0, error="lost")], base, 0.1) == {"error": "lost"}
    bf16, fp32 = (peers_list.Peer(each, "dynexport", each, Path(each)) for each in ("bf16", "fp32"))
    other = peers_list.Peer("other", "llama", "bf16", Path("other"))
    assert peers_table.base_of(other, [other, fp32, bf16]) is bf16 and peers_table.base_of(other, [other]) is None
    assert peers_table.base_of(other, [other, fp32]) is fp32
    disturbed = peers_table.figures([row(0, 0.03, others=0.2)], base, quiet=0.1)
    assert (disturbed["decode_milliseconds"], disturbed["decode_rounds"]) == (None, 0)
    assert peers_table.figures([row(0, 0.03, others=None)], base, quiet=0.1)["decode_rounds"] == 1


def test_quality_is_counted_as_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    true, own = (np.log(x, dtype=np.float32)[None, None].repeat(2, axis=1) + 3 for x in (p, q))
    found = peers_table.quality(own, true, np.array([[0, 1]]))
    assert found["kl"] == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-5)
    assert found["perplexity"] == pytest.approx(2)  # token 1 has the probability 0.5


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip_bundle: Path) -> Path:  # noqa: F811
    """A home with fake runtimes: llama has both models, genai a broken one, openvino is not installed."""
    (tmp_path / "fake.py").write_text(FAKE)
    for engine in ("llama", "genai", "dynexport"):
        python = tmp_path / engine / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} {tmp_path}/fake.py - "$@"\n')
        python.chmod(0o755)
    real = peers_prepare.python_of
    for module in (peers_list, peers_prepare):
        monkeypatch.setattr(module, "python_of", lambda at, name: tmp_path / name / "bin" / "python")
    assert real(tmp_path, "dynexport") == Path(sys.executable)
    lines = [("slow", "llama"), ("fast", "llama"), ("broken", "genai"), ("slow", "openvino"), ("absent", "llama")]
    for name in ("slow", "fast", "broken"):
        (tmp_path / name).touch()
    found = [peers_list.Peer(f"{engine} {name}", engine, "fp32", tmp_path / name) for name, engine in lines]
    monkeypatch.setattr(peers, "others", lambda models: found)
    copied(skip_bundle, tmp_path / "bundle")
    return tmp_path


def test_a_table_names_what_is_missing_and_what_failed(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "text.txt").write_text("Once upon a time " * 20)
    arguments = ["peers.py", "--home", home, "--ours", f"fp32={home}/bundle", "--rounds", 1, "--json", home / "r.json"]
    arguments += ["--text", home / "text.txt", "--window", 4, "--windows", 2, "--shape", "256x1", "--shape", "64x8"]
    monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
    assert peers.main() == 1  # one failed
    out = capsys.readouterr().out
    assert "| dynexport bundle | 200 | 1.00 | 10.00 | 1.00 | 0.50 | 3 | 0.0000 |" in out
    assert "| llama slow | 600 | 3.00 | 30.00 | 3.00 |" in out and "| llama fast | 100 | 0.50 | 5.00 | 0.50 |" in out
    assert "| genai broken | exit code 1: it ran out of memory |" in out
    assert "| openvino slow | not installed (--install) |" in out
    assert "| llama absent | no model absent (--prepare) |" in out
    assert "256 tokens, 1 rows" in out and "64 tokens, 8 rows" in out
    assert "Other processes took at most 2.0% of the machine" in out and "llama 1.2" in out
    monkeypatch.setattr(sys, "argv", [*map(str, arguments), "--add", "--only", "dynexport"])
    peers.main()
    kept = json.loads((home / "r.json").read_text())
    rounds = [each["round"] for each in kept["rows"] if (each["label"], each["shape"]) == ("dynexport bundle", "64x8")]
    assert rounds == [0, 1] and kept["quality"]["genai broken"]["error"]


def test_without_a_reference_no_quality_is_made_up(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "dynexport" / "bin" / "python").unlink()
    (home / "dynexport" / "bin" / "python").symlink_to("/bin/false")
    (home / "text.txt").write_text("Once upon a time " * 20)
    arguments = ["peers.py", "--home", home, "--ours", f"fp32={home}/bundle", "--rounds", 0, "--json", home / "r.json"]
    arguments += ["--text", home / "text.txt", "--window", 4, "--windows", 2]
    monkeypatch.setattr(sys, "argv", [str(each) for each in arguments])
    with pytest.raises(SystemExit, match=r"^error: dynexport bundle: exit code 1"):
        peers.main()
    monkeypatch.setattr(sys, "argv", [each.replace("fp32=", "int8=") for each in sys.argv])
    with pytest.raises(SystemExit, match=r"^error: --text: expected a bundle of the group fp32"):
        peers.main()
    assert not (home / "r.json").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["--ours", "fp99=x"], ["--ours", "fp32"], ["--ours", "fp32=none"], ["--ours", "fp32=x", "--shape", "8"]],
)
def test_bad_arguments_are_told(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2 and "expected" in capsys.readouterr().err


def test_an_install_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_prepare.sys, "executable", "/bin/false")
    monkeypatch.setattr(sys, "argv", ["peers.py", "--home", str(tmp_path), "--install", "--only", "genai"])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert "error: genai: making " in str(ended.value.code) and "\n" not in str(ended.value.code)
