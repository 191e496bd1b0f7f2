"""A chat on standard input: lines that people type at a terminal, or lines that a pipe brings."""

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
    """Have every line answered, until there are no more.

    At a terminal Ctrl-C ends an answer, and at the prompt the chat, as Ctrl-D does; a message that cannot be answered
    is told. In a pipe either ends the chat.
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
    """What people type, with the arrow keys, history and whatever else they expect of a line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.output import create_output

    # Where standard output goes elsewhere, people look at standard error.
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
    """Within, what is typed during an answer is not shown, and waits for the next prompt: the end of input, too."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def _history() -> History:
    """What was typed in earlier chats: in the user's state directory, for no one else to read."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    path = Path(state).expanduser() / "dynexport" / "history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    except (OSError, RuntimeError):  # a home that cannot be written, or none at all
        return InMemoryHistory()
    return FileHistory(path)
