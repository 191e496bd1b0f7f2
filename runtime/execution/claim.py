"""A lock that refuses a second user instead of making it wait: two users' tokens would mix."""

from __future__ import annotations

import threading

from dynexport.runtime.bundle.errors import DynexportError


class Claim:
    """A context manager that one user at a time can hold, from any thread.

    Args:
        refusal: the error message for a second user, one line.
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        """Take the claim. Raises DynexportError when another user holds it."""
        if not self._lock.acquire(blocking=False):
            raise DynexportError(self._refusal)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


__all__ = ["Claim"]
