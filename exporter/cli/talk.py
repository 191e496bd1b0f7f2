"""Chat on standard input, at a terminal or from a pipe."""

from __future__ import annotations

import os
import sys
import termios
import tty
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dynexport.exporter.cli.output import Output
from dynexport.exporter.cli.prompts import piped_lines
from dynexport.runtime.bundle.errors import DynexportError

if TYPE_CHECKING:
    from prompt_toolkit.history import History


def talk(out: Output, answer: Callable[[str], None]) -> None:
    """Answer every line of standard input.

    At a terminal, Ctrl-C stops an answer; at the prompt, Ctrl-C or Ctrl-D ends the chat; an error is a warning. With a
    pipe, Ctrl-C and errors end the chat.
    """
    at_terminal = sys.stdin.isatty()
    with closing(_typed_lines() if at_terminal else piped_lines()) as lines:
        for line in lines:
            try:
                if line.strip():
                    answer(line)
            except DynexportError as error:
                if not at_terminal:
                    raise
                out.warn(str(error))
            except KeyboardInterrupt:
                if not at_terminal:
                    raise
                out.stream("\n")


def _typed_lines() -> Generator[str, None, None]:
    """Yield the lines typed at a terminal, with line editing and history."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # The prompt goes to standard error if standard output is redirected.
    session: PromptSession[str] = PromptSession(history=_history(), output=create_output(always_prefer_tty=True))
    with _keys_kept():
        while True:
            try:
                line = session.prompt([("ansicyan", "> ")])
            except EOFError:
                return
            yield line


@contextmanager
def _keys_kept() -> Iterator[None]:
    """Hide keys typed during an answer and keep them, Ctrl-D too, for the next prompt."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _history() -> History:
    """Return the history of earlier chats: a file in the user's state directory, readable by the user only."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        path = Path(state).expanduser() / "dynexport" / "history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except (OSError, RuntimeError):  # no home directory, or it is not writable
        return InMemoryHistory()
    return FileHistory(path)
