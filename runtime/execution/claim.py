"""Something that one user at a time may hold: a second is refused, where waiting would mix the two up."""

from __future__ import annotations

import threading

from dynexport.runtime.bundle.errors import DynexportError


class Claim:
    """Held within ``with``, by one user at a time in whatever thread.

    Args:
        refusal: what a second one is told, in one line.
    """

    def __init__(self, refusal: str) -> None:
        self._refusal = refusal
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        """Raise DynexportError when another holds it."""
        if not self._lock.acquire(blocking=False):
            raise DynexportError(self._refusal)

    def __exit__(self, *error: object) -> None:
        self._lock.release()


__all__ = ["Claim"]
