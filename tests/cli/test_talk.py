"""A chat at a terminal: what keys do, what Ctrl-C ends, and where history is kept."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundles import command, environment

from dynexport.exporter.cli import talk
from dynexport.exporter.cli.output import Output
from dynexport.runtime import DynexportError


class Terminal(io.StringIO):
    """A stream that says that it is one."""

    def isatty(self) -> bool:
        return True


def test_keys_and_history(skip_bundle: Path, tmp_path: Path) -> None:
    """An arrow key moves the cursor; what is typed during the answer, the end of input too, waits for the prompt."""
    words = command("run", skip_bundle, "--chat", "--max-new-tokens", 2, "--json", tmp_path / "chat.json")
    process, terminal = pty.fork()
    if process == 0:
        os.execve(words[0], words, environment(HOME=str(tmp_path), XDG_STATE_HOME="", TERM="xterm"))
    seen = b""
    with contextlib.suppress(OSError):  # when nobody has it open any more
        while select.select([terminal], [], [], 60)[0]:
            before, seen = seen, seen + os.read(terminal, 4096)
            if b"> " in seen and b"> " not in before:
                os.write(terminal, b"helo\x1b[Dl\r\x04")
        os.kill(process, signal.SIGKILL)  # it has fallen silent
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, seen
    assert json.loads((tmp_path / "chat.json").read_text())["messages"][0]["content"] == "hello"
    history = tmp_path / ".local" / "state" / "dynexport" / "history"
    assert "+hello" in history.read_text()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (history, history.parent)] == [0o600, 0o700]


def test_what_ends_an_answer_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[str]:
        yield from ("too long", "  ", "stopped", "good")
        raise KeyboardInterrupt  # at the prompt

    answered = []

    def answer(line: str) -> None:
        if line == "too long":
            raise DynexportError("prompt: expected at most 3 tokens")
        if line == "stopped":
            raise KeyboardInterrupt
        answered.append(line)

    monkeypatch.setattr(talk, "_typed_lines", lines)
    monkeypatch.setattr("sys.stdin", Terminal())
    out = Output(None)
    with pytest.raises(KeyboardInterrupt):
        talk.talk(out, answer)
    assert (answered, out.warnings) == (["good"], ["prompt: expected at most 3 tokens"])


def test_history_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert type(talk._history()).__name__ == "InMemoryHistory"


def test_a_terminal_does_not_obey_what_a_model_or_a_bundle_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "a\x1b]52;c;x\x07\tb\x9b1m\n"
    monkeypatch.setattr("sys.stdout", Terminal())
    Output(None).stream(hostile + "é\u200d")
    assert sys.stdout.getvalue() == "a\\x1b]52;c;x\\x07\tb\\x9b1m\né\u200d"
    monkeypatch.setattr("sys.stdout", io.StringIO())
    out = Output(None)
    out.stream(hostile)
    for tell in (out.say, out.warn, out.note):
        tell(hostile)
    out.table(hostile, ["x"], [[hostile]])
    out.facts(hostile, [(hostile, hostile)])
    shown = sys.stdout.getvalue().removeprefix(hostile) + capsys.readouterr().err
    assert "\\x1b]52;c;x\\x07" in shown and not {"\x1b", "\x07", "\x9b"} & set(shown)
