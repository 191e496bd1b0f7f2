"""Which engines were built here: their hashes, kept outside of bundles, which come from elsewhere.

An engine is native code, and TensorRT does not say what it checks of it. So an engine that this user's own builds have
not written is given to TensorRT only when the user says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from dynexport.runtime.bundle.errors import DynexportError


def prepare() -> None:
    """Make sure that engines can be remembered. Raises DynexportError when they cannot."""
    try:
        _home().mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(_home(), os.W_OK | os.X_OK):
            raise PermissionError(None, "a directory that cannot be written to")
    except OSError as error:
        raise DynexportError(
            f"{_home()}: expected a place to remember engines that were built here, found: {error.strerror}; name "
            "another in the environment variable XDG_STATE_HOME"
        ) from error


def remember(sha256: str) -> None:
    """Note that an engine was built here. Raises OSError when that cannot be."""
    (_home() / sha256).touch()


def is_known(sha256: str) -> bool:
    """Whether an engine was built here."""
    return (_home() / sha256).exists()


def _home() -> Path:
    """A directory with an empty file for each, named by its hash."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - without a home too
    return Path(state) / "dynexport" / "engines"


__all__ = ["is_known", "prepare", "remember"]
