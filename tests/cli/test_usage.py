"""What every command has in common: help with examples, one-line errors, exit codes, the log of --debug."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from bundles import CONFORMANCE, dynexport, error_of

from dynexport.exporter.cli.arguments import read_text
from dynexport.exporter.cli.main import cli

COMMANDS = sorted(cli.commands)


def test_the_commands_that_there_are() -> None:
    assert {"bench", "convert", "doctor", "eval", "inspect", "run", "verify"} <= set(COMMANDS)


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_says_what_it_does_and_shows_examples(command: str | None, flag: str) -> None:
    ran = dynexport(*filter(None, (command, flag)))
    assert (ran.code, ran.err) == (0, "")
    assert "Examples:" in ran.out
    assert ran.out.count("  dynexport ") >= 2
    assert "--debug" in ran.out if command is None else f"dynexport {command} " in ran.out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_command_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the point where the work would begin."""
    examples = [line.split("|")[0] for line in cli.commands[command].epilog.splitlines() if "dynexport" in line]
    for example in examples:
        words = example.replace('"', "").split() if '"' not in example else _split(example)
        assert words[:2] == ["dynexport", command]
        cli.commands[command].make_context(command, words[2:])


def test_the_examples_of_the_overview_are_understood() -> None:
    examples = [line for line in (cli.help or "").splitlines() if line.strip().startswith("dynexport")]
    for example in examples:
        words = _split(example)
        cli.commands[words[1]].make_context(words[1], words[2:])


def _split(example: str) -> list[str]:
    import shlex

    return shlex.split(example)


def test_the_version() -> None:
    ran = dynexport("--version")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("dynexport, version ")


def test_no_command_shows_the_help_and_is_an_error() -> None:
    ran = dynexport()
    assert (ran.code, ran.out) == (2, "")
    assert "Examples:" in ran.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["transmogrify"], "No such command 'transmogrify'"),
        (["--loud"], "--loud"),  # click's words differ from version to version
        (["run"], "Missing argument 'BUNDLE'.; see dynexport run --help"),
        (["run", "a", "b"], "unexpected extra argument (b)"),
        (["run", "a", "--nope"], "--nope"),
        (["run", "a", "--seed", "x"], "Invalid value for '--seed': 'x' is not a valid integer"),
        (["run", "a", "--temperature", "hot"], "'--temperature': 'hot' is not a valid float"),
        (["run", "a", "--ids"], "Option '--ids' requires an argument"),
        (["convert", "m"], "Missing option '-o' / '--output'"),
        (["convert", "m", "-o", "b", "--strategy", "guess"], "'guess' is not one of 'dense', 'unified-skip'"),
        (
            ["convert", "m", "-o", "b", "--precision", "fp8"],
            "'fp8' is not one of 'auto', 'fp32', 'fp16', 'bf16', 'int8', 'int4'",
        ),
        (["convert", "m", "-o", "b", "--speedup", "abc"], "Invalid value for '--speedup': 'abc' is not a valid float"),
        (["eval", "b"], "Missing option '--text'"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(arguments: list[str], expected: str) -> None:
    assert expected in error_of(dynexport(*arguments))


@pytest.mark.parametrize("place", [0, 1, 4])
def test_debug_writes_the_traceback_to_a_file_and_names_it(
    tmp_path: Path, place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = ["run", "no-such-bundle", "--ids", "1"]
    arguments.insert(place, "--debug")
    ran = dynexport(*arguments)
    assert (ran.code, ran.out) == (2, "")
    error, log = ran.err.splitlines()
    assert error.startswith("error: no-such-bundle: expected a bundle")
    path = Path(log.removeprefix("traceback: "))
    assert path.parent == tmp_path
    assert "Traceback" in path.read_text() and "DynexportError" in path.read_text()


def test_without_debug_no_log_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error_of(dynexport("run", "no-such-bundle", "--ids", "1"))
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_called_one_and_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("first\nsecond \x1b[31m line")

    monkeypatch.setattr("dynexport.exporter.cli.doctor.Machine.this", broken)
    ran = dynexport("doctor")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "error: this is a bug in dynexport: RuntimeError: first second [31m line; run it again with --debug\n"
    )


def test_out_of_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy() -> None:
        raise MemoryError

    monkeypatch.setattr("dynexport.exporter.cli.doctor.Machine.this", greedy)
    assert "out of memory; use a smaller model" in error_of(dynexport("doctor"))


def test_paths_with_brackets_and_colons_are_shown_as_they_are(tmp_path: Path) -> None:
    bundle = tmp_path / "[red]:smile:[" / "b"
    ran = dynexport("convert", CONFORMANCE / "dense", "--no-golden", "-o", bundle)
    assert ran.code == 0 and f"Bundle {bundle}" in ran.out
    assert f"Bundle {bundle}" in dynexport("inspect", bundle).out


def test_text_from_a_pipe() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"Hello" * 50)
    os.close(writing)
    assert read_text(Path(f"/dev/fd/{reading}"), 10) == ("Hello" * 50)[:160]
    os.close(reading)
