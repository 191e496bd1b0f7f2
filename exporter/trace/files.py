"""Write traces as files: choose the format by suffix, check the path, write atomically."""

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
    """The output file of a trace, checked before the generation starts.

    Args:
        path: the file; its suffix .png, .html or .json selects the format.

    Raises:
        DynexportError: if the suffix is another one, the path cannot be written, or a package for drawing is missing.
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
        """Write the file atomically; on failure an earlier file is kept.

        Raises:
            DynexportError: if the file cannot be written.
        """
        content = self._render(trace)
        try:
            write_file(self.path, content)
        except OSError as error:
            raise not_writable(self.path, "trace", error) from error
