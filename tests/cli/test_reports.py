"""What commands report: tables for people, and with ``--json -`` JSON and nothing else on standard output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE, Ran, change_manifest, copied, dynexport

from dynexport.runtime.measure.bandwidth import last_level_cache

TEXT = "the cat sat on the mat, and nobody knows why it did so. " * 10


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def commands(skip_bundle: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """One good call of every command that reports."""
    output = tmp_path_factory.mktemp("out") / "bundle"
    sizes = ["--prompt-tokens", 4, "--threads", 1]
    return {
        "convert": ["convert", CONFORMANCE / "skip-2x", "--no-golden", "-o", output],
        "inspect": ["inspect", skip_bundle],
        "doctor": ["doctor"],
        "run": ["run", skip_bundle, "--prompt", "Hello", "--max-new-tokens", 4, "--threads", 1],
        "eval": ["eval", skip_bundle, "--text", text, "--window", 16, "--max-tokens", 64, *sizes],
        "bench": ["bench", skip_bundle, "--new-tokens", 2, "--repeats", 1, *sizes],
    }


CHECKS: dict[str, Callable[[Any], bool]] = {
    "convert": lambda r: (r["strategy"], r["golden_rows"], r["depths"][0]["keep"]) == ("unified-skip", 0, [0, 2, 4, 7]),
    "inspect": lambda r: (r["model"]["layers"], r["cache_bytes_per_token"]) == (8, 8 * 2 * 2 * 8 * 4),
    "doctor": lambda r: all(r["kernels"].values()) and bool(r["packages"]["onnxruntime"]),
    "run": lambda r: (len(r["ids"]), r["finish_reason"], r["speedup"]) == (4, "length", "2"),
    "eval": lambda r: [(row["name"], row["tokens"]) for row in r["results"]] == [("full", 48), ("2", 48)],
    "bench": lambda r: [row["name"] for row in r["results"]] == ["full", "2"],
}


@pytest.mark.parametrize("name", CHECKS)
def test_json_on_standard_output_is_alone_there(commands: dict[str, list[Any]], name: str) -> None:
    ran = dynexport(*commands[name], "--json", "-")
    assert ran.code == 0, ran.err
    assert CHECKS[name](ran.report)
    assert ran.err, "people are told on standard error"


@pytest.mark.parametrize("name", CHECKS)
def test_json_in_a_file_leaves_the_tables_where_they_are(
    commands: dict[str, list[Any]], name: str, tmp_path: Path
) -> None:
    (tmp_path / "report.json").write_text("an earlier one")
    ran = dynexport(*commands[name], "--json", tmp_path / "report.json")
    assert ran.code == 0 and ran.out
    assert CHECKS[name](json.loads((tmp_path / "report.json").read_text()))


def good(ran: Ran) -> str:
    """The standard output, one space between words, of a command that went well without a warning."""
    assert (ran.code, ran.err) == (0, "")
    return " ".join(ran.out.replace("│", " ").split())


def test_the_summary_of_convert(commands: dict[str, list[Any]]) -> None:
    out = good(dynexport(*commands["convert"]))
    for words in (
        "strategy unified-skip",
        "family llama, 8 layers, hidden 32, vocabulary 89",
        "cache 1024 bytes per token, 262.1 KB for a full context",
        "golden vectors none: left out as asked",
        "peak memory ",
        "time ",
        "2 4 of 8 0, 2, 4, 7 1.91x",
    ):
        assert words in out


def test_the_tables_of_inspect(skip_bundle: Path) -> None:
    out = good(dynexport("inspect", skip_bundle))
    for words in ("input_ids input int64 B x S", "past_key_values.0.key input float B x 2 x M x 8", "tokenizer.json"):
        assert words in out
    assert "past_key_values.1.key" not in out


def test_a_bundle_says_whether_it_has_a_tokenizer(skip_bundle: Path, ids_bundle: Path) -> None:
    for bundle, said in ((skip_bundle, "tokenizer.json, with a chat template"), (ids_bundle, "none: run takes --ids")):
        table = dynexport("inspect", bundle).err + dynexport("inspect", bundle).out
        assert said in " ".join(table.split())
    assert dynexport("inspect", skip_bundle, "--json", "-").report["tokens"]["turn_end"] == [88]


def test_the_tables_of_doctor() -> None:
    out = good(dynexport("doctor"))
    assert "GroupQueryAttention available" in out and "onnxruntime 1." in out and "missing; fix" not in out


def test_the_table_of_eval(commands: dict[str, list[Any]]) -> None:
    out = good(dynexport(*commands["eval"]))
    assert "Perplexity on text.txt, 48 decoded tokens" in out and "full 8 of 8 8.00" in out and "2 4 of 8 4.00" in out


def test_the_table_of_bench(commands: dict[str, list[Any]]) -> None:
    ran = dynexport(*commands["bench"])
    assert ran.code == 0 and "warning: 2: ratios that may not repeat: fewer than 3 repetitions" in ran.err
    out = " ".join(ran.out.replace("│", " ").split())
    assert "fp32, batch 1, 4 prompt tokens, 2 decode steps, medians of 1 repetitions" in out
    assert "full 8 of 8 " in out and "2 4 of 8 " in out
    assert "1.00x 1.00x 1.00" in out and "inside the engine; of that" in out
    assert "the prompt: " in out and "other processes took " in out
    if last_level_cache() is not None:
        assert "KB): a step's bytes fit the last-level cache of" in out


def test_a_checkpoint_that_was_not_trained_to_skip_is_warned_about(
    skip_bundle: Path, text: Path, tmp_path: Path
) -> None:
    arguments = ["--strategy", "unified-skip", "--speedup", 2, "--no-golden", "-o", tmp_path / "b"]
    ran = dynexport("convert", CONFORMANCE / "dense", *arguments)
    assert ran.code == 0 and "warning: this checkpoint does not declare that it was trained to skip" in ran.err
    bundle = copied(skip_bundle, tmp_path / "c")
    change_manifest(bundle, lambda fields: fields["depths"][0].update(trained=False))
    ran = dynexport("eval", bundle, "--text", text, "--window", 16, "--prompt-tokens", 4, "--max-tokens", 16)
    assert ran.code == 0 and "warning: this checkpoint does not declare" in ran.err


def test_run_streams_text_or_ids(skip_bundle: Path, ids_bundle: Path) -> None:
    sizes = ["--max-new-tokens", 5, "--threads", 1]
    text = dynexport("run", skip_bundle, "--prompt", "Hello", *sizes)
    report = dynexport("run", skip_bundle, "--prompt", "Hello", *sizes, "--json", "-").report
    assert text.out == report["text"] + "\n" and len(report["text"]) == 5
    for bundle in (skip_bundle, ids_bundle):
        ids = dynexport("run", bundle, "--ids", "1, 2,3", *sizes)
        report = dynexport("run", bundle, "--ids", "1,2,3", *sizes, "--json", "-").report
        assert ids.out == ",".join(map(str, report["ids"])) + "\n" and report["prompt_ids"] == [1, 2, 3]


def test_run_takes_the_ratio_that_it_is_told(ids_bundle: Path) -> None:
    kept = {}
    for ratio in ("1", "2", "1.5", "1.50"):
        ran = dynexport("run", ids_bundle, "--ids", "5", "--speedup", ratio, "--max-new-tokens", 2, "--json", "-")
        kept[ratio] = ran.report["layers"]
    assert [len(layers) for layers in kept.values()] == [8, 4, 5, 5]
    for depth, layers in (("full", 8), ("1.5", 5)):
        ran = dynexport("run", ids_bundle, "--ids", "5", "--depth", depth, "--max-new-tokens", 2, "--json", "-")
        assert (ran.report["speedup"], len(ran.report["layers"])) == (depth, layers)


def test_run_samples_by_its_seed(skip_bundle: Path) -> None:
    arguments = ["run", skip_bundle, "--prompt", "Hello", "--temperature", 2, "--max-new-tokens", 12, "--threads", 1]
    texts = [dynexport(*arguments, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert dynexport(*arguments, "--top-k", 1).out == dynexport(*arguments[:4], *arguments[6:]).out


def test_run_stops_at_the_end_of_the_context(ids_bundle: Path) -> None:
    ran = dynexport("run", ids_bundle, "--ids", ",".join(["1"] * 23), "--json", "-")
    assert (len(ran.report["ids"]), ran.report["finish_reason"]) == (2, "length")


def test_chat_with_one_message(skip_bundle: Path) -> None:
    arguments = ["--max-new-tokens", 5, "--speedup", 1, "--json", "-", "--threads", 1]
    chat = dynexport("run", skip_bundle, "--chat", "--prompt", "Hello", *arguments).report
    plain = dynexport("run", skip_bundle, "--prompt", "Hello", *arguments).report
    assert len(chat["prompt_ids"]) > len(plain["prompt_ids"]) and chat["ids"] != plain["ids"]


def test_chat_on_standard_input(skip_bundle: Path) -> None:
    arguments = ["run", skip_bundle, "--chat", "--max-new-tokens", 5, "--speedup", 1, "--threads", 1]
    ran = dynexport(*arguments, stdin="Hello\n\nAnd then?\n")
    assert ran.code == 0, ran.err
    messages = dynexport(*arguments, "--json", "-", stdin="Hello\n\nAnd then?").report["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert ran.out == "".join(message["content"] + "\n" for message in messages[1::2])
    first = dynexport(*arguments, "--prompt", "Hello", "--json", "-").report
    assert messages[1]["content"] == first["text"]


def test_chat_with_nothing_to_answer(skip_bundle: Path) -> None:
    ran = dynexport("run", skip_bundle, "--chat", "--json", "-", stdin="")
    assert (ran.code, ran.report["messages"], ran.report["turns"]) == (0, [], [])


def test_inspect_names_the_operators_that_may_become_plugins(tmp_path: Path) -> None:
    bundle, arguments = tmp_path / "bundle", ["--target", "tensorrt", "--plugins", "--no-golden", "--dtype", "fp16"]
    assert dynexport("convert", CONFORMANCE / "mod-topk", *arguments, "-o", bundle).code == 0
    assert "CapacityTopK x2" in good(dynexport("inspect", bundle))
    report = json.loads(dynexport("inspect", bundle, "--json", "-").out)
    assert report["precision"] == "fp16"
    assert [(program["phase"], program["graph"]) for program in report["programs"]] == [
        ("prompt", "model"),
        ("decode", "decode"),
    ]
    told = report["operators"]
    assert told["model"]["ours"] == {"CapacityTopK": 2, "GatedScatterAdd": 2} and told["decode"]["ours"] == {}
    assert told["model"]["nodes"] > told["decode"]["nodes"] > 100
