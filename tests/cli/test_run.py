"""``dynexport run``: where prompts come from, what the model's author recommends, and ratios it was not trained for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import CHAT, Ran, change_manifest, checkpoint, copied, dynexport, error_of, replace_file

from dynexport.exporter.bundle.describe import mark_trained
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies import strategies
from dynexport.runtime import Bundle

SIZES = ["--max-new-tokens", 3, "--threads", 1]
LATIN = "café".encode("latin-1")


def run(bundle: Path, *arguments: object, stdin: str | bytes = "") -> Ran:
    return dynexport("run", bundle, *arguments, *SIZES, stdin=stdin)


def report(bundle: Path, *arguments: object, stdin: str | bytes = "") -> dict[str, Any]:
    ran = run(bundle, *arguments, "--json", "-", stdin=stdin)
    assert ran.code == 0, ran.err
    found: dict[str, Any] = ran.report
    return found


def test_a_prompt_from_a_file_or_a_pipe(skip_bundle: Path, tmp_path: Path) -> None:
    text = "Hello\nhow are you?"
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
    expected = report(skip_bundle, "--prompt", text)["prompt_ids"]
    for arguments, stdin in (
        (["--prompt", "-"], text),
        ([], text + "\n"),
        (["--prompt-file", tmp_path / "p.txt"], "not this"),
        (["--prompt-file", "-"], text),
    ):
        assert report(skip_bundle, *arguments, stdin=stdin)["prompt_ids"] == expected
    one = report(skip_bundle, "--chat", "--prompt", text)
    assert report(skip_bundle, "--chat", "--prompt", "-", stdin=text)["ids"] == one["ids"]
    assert report(skip_bundle, "--ids", "1,2", stdin=text)["prompt_ids"] == [1, 2]


BAD: dict[str, tuple[list[Any], bytes, str]] = {
    "an option": (["--prompt", "caf\udce9"], b"", "'--prompt': expected UTF-8, found the byte 0xe9 after 3 characters"),
    "a stop text": (["--ids", "1", "--stop", "\udcff"], b"", "'--stop': expected UTF-8, found the byte 0xff after 0"),
    "standard input": (["--prompt", "-"], LATIN, "standard input: expected UTF-8 text, found 0xe9 at byte 3"),
    "a pipe": ([], LATIN, "standard input: expected UTF-8 text, found 0xe9 at byte 3"),
    "nothing": (["--prompt", "-"], b"", "--prompt: expected text, found none"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], b"", "expected one of --prompt TEXT"),
    "a file and ids": (["--ids", "1", "--prompt-file", "b"], b"", "expected one of --prompt TEXT"),
    "no file": (
        ["--prompt-file", "/nowhere"],
        b"",
        "/nowhere: expected a text file for --prompt-file, found none; name one, or give it on standard input",
    ),
    "a directory": (["--prompt-file", "/"], b"", "/: expected a text file for --prompt-file, found a directory"),
    "no end": (["--prompt-file", "/dev/zero"], b"", "/dev/zero: expected at most 64 MiB of text, found more"),
    "a system message alone": (["--prompt", "a", "--system", "b"], b"", "expected with --chat, found without"),
    "a variable alone": (["--prompt", "a", "--template-var", "b=1"], b"", "expected with --chat, found without"),
    "Python's word": (
        ["--chat", "--prompt", "a", "--template-var", "x=False"],
        b"",
        "--template-var: x: expected JSON, false, found False",
    ),
    "no value": (["--chat", "--prompt", "a", "--template-var", "x"], b"", "--template-var: expected FIELD=VALUE"),
    "our variable": (
        ["--chat", "--prompt", "a", "--template-var", "messages=[]"],
        b"",
        "template variable messages: expected another name",
    ),
}


@pytest.mark.parametrize(("arguments", "stdin", "expected"), BAD.values(), ids=BAD)
def test_bad_prompts(skip_bundle: Path, arguments: list[Any], stdin: bytes, expected: str) -> None:
    assert expected in error_of(run(skip_bundle, *arguments, stdin=stdin))


def test_system_messages_and_variables(skip_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(skip_bundle, tmp_path / "b")
    template = "{% if enable_thinking is false %}quiet {% endif %}" + CHAT
    replace_file(bundle, "chat_template.jinja", template.encode())
    plain = report(bundle, "--chat", "--prompt", "Hi")["prompt_ids"]
    quiet = report(bundle, "--chat", "--prompt", "Hi", "--template-var", "enable_thinking=false")
    assert quiet["prompt_ids"][len("quiet ") :] == plain and quiet["warnings"] == []
    briefed = report(bundle, "--chat", "--prompt", "Hi", "--system", "Be brief.")["prompt_ids"]
    assert briefed[-len(plain) :] == plain and len(briefed) > len(plain)
    misspelt = run(bundle, "--chat", "--template-var", "enable_thinkng=false", "--json", "-", stdin="Hi\n")
    assert misspelt.report["warnings"] == ["--template-var enable_thinkng: the chat template reads no such variable"]
    assert "warning: --template-var enable_thinkng" in misspelt.err
    lines = run(bundle, "--chat", "--system", "Be brief.", "--json", "-", stdin="Hi\n")
    assert lines.report["messages"][0] == {"role": "system", "content": "Be brief."}


def recommending(skip_bundle: Path, directory: Path, **fields: Any) -> Path:
    bundle = copied(skip_bundle, directory)
    replace_file(bundle, "generation_config.json", json.dumps(fields).encode())
    return bundle


def test_what_the_author_recommends_is_used_and_shown(skip_bundle: Path, tmp_path: Path) -> None:
    bundle = recommending(skip_bundle, tmp_path / "b", do_sample=True, temperature=2.0, top_p=0.9, num_beams=2)
    greedy = run(skip_bundle, "--prompt", "Hello").out
    ran = run(bundle, "--prompt", "Hello", "--seed", 1, "--json", "-")
    expected = {"temperature": 2.0, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 1}
    assert expected.items() <= ran.report["sampling"].items()
    assert "temperature 2, top-p 0.9, top-k 50, seed 1; --temperature 0" in ran.err
    assert ran.report["warnings"] == ["generation_config.json asks for num_beams 2: dynexport does not do that"]
    same = run(skip_bundle, "--prompt", "Hello", "--seed", 1, "--temperature", 2, "--top-p", 0.9, "--top-k", 50)
    assert ran.report["text"] + "\n" == same.out != greedy
    assert run(bundle, "--prompt", "Hello", "--temperature", 0).out == greedy
    given = ["--temperature", 0.5, "--top-k", 0, "--min-p", 0.1, "--repetition-penalty", 1.5]
    own = report(bundle, "--prompt", "Hello", *given)["sampling"]
    expected = {"temperature": 0.5, "top_k": 0, "min_p": 0.1, "repetition_penalty": 1.5, "seed": None}
    assert (expected | {"top_p": 0.9}).items() <= own.items()


def test_biases_and_what_may_not_repeat(skip_bundle: Path) -> None:
    given = ["--ids", "1,2,3", "--logit-bias", "7=100"]
    assert report(skip_bundle, *given)["ids"] == [7, 7, 7]
    assert report(skip_bundle, *given, "--frequency-penalty", 2, "--presence-penalty", 2)["ids"] == [7, 7, 7]
    first, second, third = report(skip_bundle, *given, "--no-repeat-ngram-size", 1, "--min-new-tokens", 3)["ids"]
    assert first == 7 and len({1, 2, 3, first, second, third}) == 6
    for bad in ("x=1", "7=101", "7=a", "-1=2", "7", "99999=1"):
        assert "logit" in error_of(run(skip_bundle, "--ids", "1,2,3", "--logit-bias", bad)), bad


def test_without_do_sample_the_choice_is_greedy(skip_bundle: Path, tmp_path: Path) -> None:
    bundle = recommending(skip_bundle, tmp_path / "b", temperature=2.0, top_p=0.9, stop_strings=["B"])
    ran = run(bundle, "--prompt", "Hello")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == run(skip_bundle, "--prompt", "Hello", "--stop", "B").out


def test_filters_of_a_greedy_choice_are_told(skip_bundle: Path) -> None:
    ran = run(skip_bundle, "--prompt", "Hello", "--top-p", 0.5, "--top-k", 3)
    assert ran.code == 0 and "warning: --top-p, --top-k: expected with --temperature above 0" in ran.err
    assert run(skip_bundle, "--prompt", "Hello", "--top-p", 0.5, "--temperature", 0).err == ""


def test_a_ratio_that_the_checkpoint_was_not_trained_for(skip_bundle: Path, ids_bundle: Path, tmp_path: Path) -> None:
    trained = run(skip_bundle, "--prompt", "Hello", "--json", "-")
    assert (trained.report["speedup"], trained.report["trained"], "warning" in trained.err) == ("2", True, False)
    other = run(ids_bundle, "--ids", "1", "--speedup", "1.5", "--json", "-")
    assert (other.report["speedup"], other.report["trained"]) == ("1.5", False)
    assert "as the ratio 1.5 (5 of 8 layers) does; expect worse text" in other.report["warnings"][0]
    assert other.err.count("warning: this checkpoint does not declare that it was trained to skip layers") == 1
    bundle = copied(skip_bundle, tmp_path / "b")
    change_manifest(bundle, lambda fields: fields["depths"][0].update(trained=False))
    full = run(bundle, "--prompt", "Hello", "--json", "-")
    assert (full.report["speedup"], full.report["trained"], full.report["warnings"]) == ("full", True, [])
    assert "at full depth, as the checkpoint declares no ratio" in full.err and "takes 2 (4 of 8 layers)" in full.err
    assert "warning" in run(bundle, "--prompt", "Hello", "--depth", 2).err


@pytest.mark.parametrize(
    ("declared", "trained"),
    [
        ({"strategy": "unified-skip", "speedups": [3, 2]}, True),
        ({"strategy": "unified-skip", "speedups": [2], "rule": "modulo"}, False),
        ({"strategy": "unified-skip", "keep": [0, 2, 4, 7]}, False),
        ({"strategy": "unified-skip", "speedups": [4]}, False),
        ({"strategy": "dense"}, False),
        ({"strategy": "of another version"}, False),
        ([1], False),
    ],
)
def test_what_a_checkpoint_declares(skip_bundle: Path, tmp_path: Path, declared: Any, trained: bool) -> None:
    """Of the ratio 2 by the official rule: only a checkpoint that declares just that was trained for it."""
    manifest = Bundle.open(skip_bundle).manifest
    model = open_checkpoint(checkpoint(tmp_path / "model", "skip-2x", dynexport=declared))
    (depth,) = mark_trained(model, strategies()["unified-skip"], manifest.contract, manifest.depths)
    assert depth.trained is trained


def test_what_ends_a_chat_keeps_what_was_said(skip_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    for last, expected in (
        (b"e" * 300, "prompt: expected at most"),
        (LATIN, "line 2: expected UTF-8 text, found 0xe9"),
    ):
        ran = run(skip_bundle, "--chat", "--json", path, stdin=b"Hello\n" + last + b"\n")
        assert ran.code == 2 and expected in ran.err and len(ran.err.splitlines()) == 1
        kept = json.loads(path.read_text())
        assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
        assert [turn["finish_reason"] for turn in kept["turns"]] == ["length"]
    ran = dynexport("run", skip_bundle, "--chat", "--max-new-tokens", 500, "--json", path, stdin="e" * 236 + "\n")
    assert ran.code == 0 and "warning: the context of 256 tokens is full: the answer ends here" in ran.err
    assert json.loads(path.read_text())["turns"][0]["finish_reason"] == "length"


def test_two_begin_tokens_are_told(skip_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(skip_bundle, tmp_path / "b")
    bos = report(bundle, "--prompt", "A")["prompt_ids"][0]
    change_manifest(bundle, lambda fields: fields["tokens"].update(bos=bos))
    assert f"warning: the prompt begins with token {bos} twice" in run(bundle, "--prompt", "AAB").err
    assert run(bundle, "--prompt", "ABA").err == ""


def test_drafts_change_the_time_and_not_the_text(skip_bundle: Path) -> None:
    """The drafts of the report are of the tokens of the report, and most of them were right on a text that repeats."""
    asked = ["--ids", ",".join(["5,6,7,8"] * 6), "--max-new-tokens", 40, "--stats", "--json", "-", "--speedup", 1]
    plain, drafted = (dynexport("run", skip_bundle, *asked, *more) for more in ([], ["--speculate"]))
    assert plain.code == drafted.code == 0
    told = drafted.report
    assert told["ids"] == plain.report["ids"] and "drafts" not in plain.report and "drafts:" not in plain.err
    if "drafts" in told:
        assert len(told["drafts"]) == len(told["ids"])
    assert "drafts: " in drafted.err and "tokens a step" in drafted.err
    by_depth = dynexport("run", skip_bundle, *asked, "--speculate", 3, "--draft", "2")
    assert by_depth.code == 0 and by_depth.report["ids"] == told["ids"]


def test_drafts_that_cannot_be_made(skip_bundle: Path) -> None:
    asked = ["run", skip_bundle, "--ids", "1,2"]
    assert "--draft: expected with --speculate" in error_of(dynexport(*asked, "--draft", "2"))
    assert "depth: expected 1, 2" in error_of(dynexport(*asked, "--speculate", "--draft", "9"))
    assert "--speculate: expected a number of drafts, 1..64, found 65" in error_of(dynexport(*asked, "--speculate", 65))
    assert "--speculate: expected a number of drafts, 1..64, found many" in error_of(
        dynexport(*asked, "--speculate", "many")
    )
