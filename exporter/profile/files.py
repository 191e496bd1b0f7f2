"""Check and write the directory of a profile; each file is written atomically."""

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
    """The output directory for pictures and ``profile.json``, checked before the measurement starts.

    Args:
        path: the directory; it is created if missing, and other files in it are kept.

    Raises:
        DynexportError: if the directory cannot be written, or matplotlib is missing.
    """

    def __init__(self, path: Path) -> None:
        pictures.require()
        self.path = checked_path("profile", path)
        self._check()

    def write(
        self, profile: Profile, measured: Measured, tokens: tuple[Token, ...], report: Mapping[str, Any], title: str
    ) -> list[Path]:
        """Draw the pictures and write all files.

        Args:
            profile: the summary to draw.
            measured: the values per token.
            tokens: the first tokens of the text, for labels.
            report: the content of ``profile.json``; finite numbers only.
            title: the name of the profiled model.

        Returns:
            The paths of the written files.

        Raises:
            DynexportError: if a file cannot be written; each file then has its complete new or earlier content.
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
        """Check that the directory, or its nearest existing parent, can be written; leave no file behind."""
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
    """Return the path or its nearest existing parent; a broken link counts as existing."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return _nearest(path.parent)
    return path
