"""Times of ``dynexport run``: its start and its tokens."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dynexport.exporter.cli.describe import start_text
from dynexport.runtime.measure.startup import StartClock, Startup


class Timings:
    """Takes the times of a run; made before the bundle is opened.

    Args:
        bundle: the bundle's directory.
    """

    def __init__(self, bundle: Path) -> None:
        self._clock = StartClock(bundle)
        self._startup: Startup | None = None
        self._tokens: list[float] = []

    def loaded(self) -> None:
        """Take the time at which the graphs are loaded."""
        self._clock.loaded()

    def token(self) -> None:
        """Take the time of a token that is shown."""
        self._tokens.append(time.perf_counter())
        self._startup = self._startup or self._clock.first_token()

    def report(self) -> dict[str, Any]:
        """Return the report's fields: those of ``Startup`` and the mean milliseconds of a later token; or no field."""
        if self._startup is None:
            return {}
        return {**self._startup.model_dump(), "token_milliseconds": self._mean()}

    def text(self) -> str:
        """Return the times as one line."""
        if self._startup is None:
            return "no token"
        told = start_text(self._startup)
        mean = self._mean()
        return told if mean is None else f"{told}; then {mean:.2f} ms a token"

    def _mean(self) -> float | None:
        """Return the mean time of the tokens after the first; several of them can come at once."""
        later = len(self._tokens) - 1
        return 1e3 * (self._tokens[-1] - self._tokens[0]) / later if later > 0 else None


__all__ = ["Timings"]
