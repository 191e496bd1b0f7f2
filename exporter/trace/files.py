"""Traces as files: the format that a name asks for, whether it can be written there, and writing it in one step."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dynexport.exporter.trace import html, png
from dynexport.exporter.trace.model import Trace
from dynexport.runtime.checks import checked_path
from dynexport.runtime.errors import DynexportError


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
        # A link stays a link: what it leads to is replaced.
        self._target = Path(os.path.realpath(path))
        self._part = self._target.with_name(f".{self._target.name}.{os.getpid()}.part")
        self._check()

    def write(self, trace: Trace) -> None:
        """Write the whole file, or leave what was there.

        Raises:
            DynexportError: when it cannot be written any more.
        """
        content = self._render(trace)
        try:
            self._part.write_bytes(content)
            self._part.replace(self._target)
        except OSError as error:
            raise self._not_writable(error.strerror) from error
        finally:
            self._part.unlink(missing_ok=True)

    def _check(self) -> None:
        try:
            if self._target.exists():
                if not self._target.is_file():
                    raise self._not_writable("a directory" if self._target.is_dir() else "something else")
                self._target.open("ab").close()
            self._part.write_bytes(b"")
            self._part.unlink()
        except OSError as error:
            raise self._not_writable(error.strerror) from error

    def _not_writable(self, found: str | None) -> DynexportError:
        return DynexportError(f"trace {self.path}: expected a file to write, found {found}")
