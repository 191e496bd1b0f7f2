"""An answer that a command prints while it is generated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

from dynexport.exporter.cli.output import Output
from dynexport.runtime.generation.request import FinishReason
from dynexport.runtime.generation.stream import Stream


class Shown:
    """Prints an answer while it is generated, and keeps what was printed.

    Attributes:
        ids: the tokens' ids.
        text: their text.
        drafts: per token the id that was drafted in its place, or None.
        finish_reason: as for ``Piece``; None for an answer that was interrupted.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.drafts: list[int | None] = []
        self.finish_reason: FinishReason | None = None

    def show(self, out: Output, stream: Stream, *, as_ids: bool, on_token: Callable[[], None] = lambda: None) -> None:
        """Print the tokens of a stream as they are generated."""
        with closing(stream) as pieces:
            for piece in pieces:
                out.stream(f"{',' if self.ids else ''}{piece.token}" if as_ids else piece.text)
                on_token()
                self.ids.append(piece.token)
                self.text += piece.text
                self.drafts.append(piece.draft)
                self.finish_reason = piece.finish_reason
        out.stream("\n")

    def report(self) -> dict[str, Any]:
        """Return the report's fields about the answer; ``drafts`` only if tokens were drafted."""
        fields = {"ids": self.ids, "text": self.text, "finish_reason": self.finish_reason}
        return fields | ({"drafts": self.drafts} if any(draft is not None for draft in self.drafts) else {})

    def drafts_text(self) -> str:
        """Return how many drafts were accepted, as one line."""
        drafted = [(draft, token) for draft, token in zip(self.drafts, self.ids, strict=True) if draft is not None]
        accepted = sum(draft == token for draft, token in drafted)
        steps = len(self.ids) - accepted
        each = f", {len(self.ids) / steps:.2f} tokens a step" if steps else ""
        return f"drafts: {accepted} tokens accepted, {len(drafted) - accepted} steps with a rejected one{each}"


__all__ = ["Shown"]
