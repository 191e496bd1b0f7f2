"""Remember the hashes of engines that this user built; they are stored outside of bundles, which are untrusted.

An engine is native code, and TensorRT does not document what it checks. So an engine that this user did not build is
loaded only with the user's consent.
"""

from __future__ import annotations

import os
from pathlib import Path

from dynexport.runtime.bundle.errors import DynexportError


def prepare() -> None:
    """Create the directory of hashes. Raises DynexportError when it cannot be written to."""
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
    """Store the hash of an engine that was built here. Raises OSError when it cannot be written."""
    (_home() / sha256).touch()


def is_known(sha256: str) -> bool:
    """Return whether an engine of this hash was built here."""
    return (_home() / sha256).exists()


def _home() -> Path:
    """Return the directory that has an empty file for every hash."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111 - without a home too
    return Path(state) / "dynexport" / "engines"


__all__ = ["is_known", "prepare", "remember"]
