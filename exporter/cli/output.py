"""Output of a command: text, tables and progress for people, a JSON report for programs."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from dynexport.runtime.bundle.atomic import check_writable, not_writable, write_file
from dynexport.runtime.bundle.errors import DynexportError, one_line, printable
from dynexport.runtime.bundle.json_text import with_nulls

json_option = click.option(
    "--json",
    "json_path",
    metavar="FILE",
    help="Write the report as JSON to a file; '-' writes it to standard output and other text to standard error.",
)


class Output:
    """Output of a command; text goes to standard output, or to standard error if the JSON report goes there.

    Args:
        json_path: file of the JSON report, "-" for standard output, None for no report.

    Raises:
        DynexportError: the file cannot be written; this is checked before any work.
    """

    def __init__(self, json_path: str | None) -> None:
        self._json_path = json_path
        if json_path is not None and json_path != "-":
            check_writable(Path(json_path), "--json")
        self._console = _console(stderr=json_path == "-")
        self._errors = _console(stderr=True)
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """Print a line."""
        self._print(printable(text))

    def stream(self, text: str) -> None:
        """Print a piece of generated text immediately; for a terminal, control characters are escaped."""
        stream = sys.stderr if self._json_path == "-" else sys.stdout
        with _written():
            stream.write(_harmless(text) if stream.isatty() else text)
            stream.flush()

    def note(self, text: str) -> None:
        """Print a line on standard error."""
        self._tell(text, "dim")

    def warn(self, text: str) -> None:
        """Print a warning on standard error and append it to ``warnings``."""
        self.warnings.append(text)
        self._tell(f"warning: {text}", "yellow")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; the first column is left-aligned, the others right-aligned."""
        table = Table(title=printable(title), title_justify="left", title_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(printable, row))
        self._print(table)

    def facts(self, title: str, facts: Sequence[tuple[str, str]]) -> None:
        """Print a table of names and values."""
        table = Table(title=printable(title), title_justify="left", title_style="bold", show_header=False)
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, value in facts:
            table.add_row(printable(name), printable(value))
        self._print(table)

    def report(self, fields: dict[str, Any]) -> None:
        """Write the JSON report if it was requested.

        Raises:
            DynexportError: the file cannot be written.
        """
        if self._json_path is None:
            return
        text = json.dumps(with_nulls(fields), indent=1, allow_nan=False) + "\n"
        if self._json_path == "-":
            with _written():
                sys.stdout.write(text)
                sys.stdout.flush()
            return
        try:
            write_file(Path(self._json_path), text.encode())
        except OSError as error:
            raise not_writable(Path(self._json_path), "--json", error) from error

    def _tell(self, text: str, style: str) -> None:
        with suppress(OSError):  # standard error may be full
            self._errors.print(one_line(text), style=style)

    def _print(self, what: str | Table) -> None:
        with _written():
            self._console.print(what)

    @contextmanager
    def progress(self, title: str) -> Iterator[ProgressBar]:
        """Show a progress bar on standard error while the block runs, if that is a terminal."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        shown = self._errors.is_terminal
        progress = Progress(*columns, console=self._errors, transient=True, disable=not shown)
        # Before rich 15, a disabled progress bar still prints an empty line at its end.
        with progress if shown else nullcontext():
            yield ProgressBar(progress, title)


class ProgressBar:
    """A progress bar."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title
        self._task = progress.add_task(title, total=None)

    def update(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done."""
        self._progress.update(self._task, completed=done, total=total)

    def working_on(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units are done, and the current unit."""
        self._progress.update(self._task, completed=done, total=total, description=f"{self._title} {printable(what)}")

    def stage(self, what: str) -> None:
        """Show the current stage, of unknown length."""
        self._progress.update(self._task, description=f"{self._title}: {printable(what)}", total=None)


def _console(*, stderr: bool) -> Console:
    # Without markup and emoji: a path may have brackets and colons.
    return Console(stderr=stderr, soft_wrap=True, highlight=False, markup=False, emoji=False)


@contextmanager
def _written() -> Iterator[None]:
    """Raise DynexportError for output in the block that cannot be written."""
    try:
        yield
    except BrokenPipeError:
        raise  # not an error: the reader closed the pipe
    except OSError as error:
        raise DynexportError(f"standard output: expected a place to write, found: {error.strerror}") from error


def _harmless(text: str) -> str:
    """Return text with its control characters escaped, except line breaks and tabs."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else printable(c) for c in text)


def bytes_text(size: float) -> str:
    """Return a size as text: "1.5 GB"."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def layers_text(layers: Sequence[int]) -> str:
    """Return layer numbers as text, with ranges: "0-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
