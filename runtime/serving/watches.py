"""Report what a scheduler does to several watches."""

from __future__ import annotations

from collections.abc import Sequence

from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.serving.watch import Watch
from dynexport.runtime.serving.work import Answer, Reason, Work


class Watches:
    """A ``Watch`` that forwards every call to others, in order.

    Args:
        watches: the others.
    """

    def __init__(self, *watches: Watch) -> None:
        self._watches = watches

    def started(self, work: Work, waited: float) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.started(work, waited)

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.ran(prompt_tokens, rows, seconds)

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.answered(answer, gap, first=first)

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.ended(answer, reason, decided, overflow)

    def dropped(self, work: Work, reason: Reason) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.dropped(work, reason)

    def refused(self) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.refused()

    def stepped(self, seconds: float) -> None:
        """Forward it."""
        for watch in self._watches:
            watch.stepped(seconds)


__all__ = ["Watches"]
