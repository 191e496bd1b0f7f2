"""What a scheduler reports while it runs; metrics implement it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.serving.work import Answer, Reason, Work


class Watch(Protocol):
    """Receives what a scheduler does, in the scheduler's thread; methods must be fast and must not raise."""

    def started(self, work: Work, waited: float) -> None:
        """A request got its rows, ``waited`` seconds after it was submitted."""

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """A call ran: some tokens of a prompt, or a decode step of some rows; ``seconds`` is the executor's time."""

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """An answer got a token, ``gap`` seconds after its latest one, or after the submission for the first."""

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """An answer ended: "stop", "length" or a ``Reason``; ``decided`` is what its routers decided, call by call."""

    def dropped(self, work: Work, reason: Reason) -> None:
        """A request ended before it got rows; ``ended`` is not called for its answers."""

    def refused(self) -> None:
        """A request found the queue full; called in the thread that submitted it."""

    def stepped(self, seconds: float) -> None:
        """A step ended; ``seconds`` is its whole time, the executor's included."""


class Unwatched:
    """A ``Watch`` that ignores everything."""

    def started(self, work: Work, waited: float) -> None:
        """Ignore it."""

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Ignore it."""

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """Ignore it."""

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Ignore it."""

    def dropped(self, work: Work, reason: Reason) -> None:
        """Ignore it."""

    def refused(self) -> None:
        """Ignore it."""

    def stepped(self, seconds: float) -> None:
        """Ignore it."""


__all__ = ["Unwatched", "Watch"]
