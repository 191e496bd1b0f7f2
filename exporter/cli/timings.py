"""Times of ``dynexport run``: its start and its tokens."""

from __future__ import annotations

import statistics
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
        """Return the report's fields: those of ``Startup`` and the median milliseconds between tokens; or no field."""
        if self._startup is None:
            return {}
        return {**self._startup.model_dump(), "token_milliseconds": self._between()}

    def text(self) -> str:
        """Return the times as one line."""
        if self._startup is None:
            return "no token"
        between = self._between()
        return start_text(self._startup) + ("" if between is None else f"; then {between:.2f} ms a token, the median")

    def _between(self) -> float | None:
        gaps = [after - before for before, after in zip(self._tokens, self._tokens[1:], strict=False)]
        return 1e3 * statistics.median(gaps) if gaps else None


__all__ = ["Timings"]
