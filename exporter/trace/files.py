"""Traces as files: the format that a name asks for, whether it can be written there, and writing it in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynexport.exporter.trace import html, png
from dynexport.exporter.trace.model import Trace
from dynexport.runtime.bundle.atomic import check_writable, not_writable, write_file
from dynexport.runtime.bundle.checks import checked_path
from dynexport.runtime.bundle.errors import DynexportError


def _json(trace: Trace) -> bytes:
    return (trace.model_dump_json() + "\n").encode()


_FORMATS: dict[str, Callable[[Trace], bytes]] = {".png": png.render, ".html": html.render, ".json": _json}


class TraceFile:
    """A file to be written when a trace is there; what can go wrong is told before.

    Args:
        path: its suffix says the format.

    Raises:
        DynexportError: for another suffix, for a place that cannot be written, or where drawing needs a package that
            is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = checked_path("trace", path)
        suffix = path.suffix.lower()
        if suffix not in _FORMATS:
            raise DynexportError(f"trace {path}: expected a name in .png, .html or .json, found {suffix or 'none'!r}")
        if suffix == ".png":
            png.require()
        self._render = _FORMATS[suffix]
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise DynexportError(f"trace {path}: expected a file to write, found something else")
        check_writable(path, "trace")

    def write(self, trace: Trace) -> None:
        """Write the whole file, or leave what was there.

        Raises:
            DynexportError: when it cannot be written any more.
        """
        content = self._render(trace)
        try:
            write_file(self.path, content)
        except OSError as error:
            raise not_writable(self.path, "trace", error) from error
