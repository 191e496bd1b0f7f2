"""The directory of a profile: whether it can be written, and writing it file by file, each in one step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynexport.exporter.profile import pictures
from dynexport.exporter.profile.measurement import Measured
from dynexport.exporter.profile.model import Profile
from dynexport.exporter.trace.model import Token
from dynexport.runtime.bundle.atomic import write_file
from dynexport.runtime.bundle.checks import checked_path
from dynexport.runtime.bundle.errors import DynexportError

REPORT = "profile.json"


class ProfileDirectory:
    """Where pictures and figures go; what can go wrong is told before anything runs.

    Args:
        path: is made if it is not there; other files in it are left alone.

    Raises:
        DynexportError: for a place that cannot be written, or without matplotlib.
    """

    def __init__(self, path: Path) -> None:
        pictures.require()
        self.path = checked_path("profile", path)
        self._check()

    def write(
        self, profile: Profile, measured: Measured, tokens: tuple[Token, ...], report: Mapping[str, Any], title: str
    ) -> list[Path]:
        """Draw and write everything.

        Args:
            tokens: the first ones of the text, to name them.
            report: the content of ``profile.json``; finite numbers only.
            title: what was profiled.

        Returns:
            The files.

        Raises:
            DynexportError: when it cannot be written any more; files are whole, the new or the earlier one.
        """
        files = pictures.render(profile, measured, tokens, title)
        files[REPORT] = (json.dumps(report, indent=1, allow_nan=False) + "\n").encode()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                write_file(self.path / name, content)
        except OSError as error:
            raise self._not_writable(error.strerror) from error
        return [self.path / name for name in files]

    def _check(self) -> None:
        """Try the directory, or the nearest above it that is there; leaves nothing behind."""
        try:
            there = _nearest(Path.cwd() / self.path)
            tempfile.TemporaryFile(dir=there).close()
            for name in (*pictures.NAMES, REPORT):
                if (self.path / name).is_dir():
                    raise self._not_writable(f"a directory in the place of {name}")
        except (OSError, ValueError) as error:
            raise self._not_writable(error.strerror if isinstance(error, OSError) else str(error)) from error

    def _not_writable(self, found: str | None) -> DynexportError:
        return DynexportError(f"-o {self.path}: expected a directory to write, found {found}")


def _nearest(path: Path) -> Path:
    """The path, or the nearest above it that is there; a link that leads nowhere is."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path
