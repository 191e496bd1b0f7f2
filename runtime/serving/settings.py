"""The sizes and bounds of a scheduler."""

from __future__ import annotations

from dataclasses import dataclass

from dynexport.runtime.bundle.checks import checked_count, checked_kind
from dynexport.runtime.generation.speculation import Speculation

# Tokens of a prompt that run between two decode steps of the other rows (docs/benchmarks.md, "Serving").
CHUNK = 48
# Memory for known prefixes where a user does not choose, in bytes.
PREFIX_BYTES = 256 << 20


@dataclass(frozen=True)
class Settings:
    """The sizes and bounds of a scheduler.

    Attributes:
        rows: most requests that run at a time.
        tokens: most tokens of a request, prompt and answer; None for the model's context.
        chunk: number of a prompt's first tokens that run between two decode steps of the others; later chunks are
            smaller (``EvenChunks``). Prompts are always cut at the same places, so that a text does not depend on the
            other requests.
        queue: most requests that wait.
        reserved: most tokens, prompts and answers, of all running requests together; None for rows * tokens.
        prefix_bytes: memory for the entries of earlier prompts, in bytes; 0 keeps none.
        speculation: how next tokens are drafted; None drafts none.

    Raises:
        DynexportError: for a number of another type or out of its range.
    """

    rows: int = 8
    tokens: int | None = None
    chunk: int = CHUNK
    queue: int = 256
    reserved: int | None = None
    prefix_bytes: int = 0
    speculation: Speculation | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "chunk", "queue"):
            checked_count(name, getattr(self, name))
        for name in ("tokens", "reserved"):
            if getattr(self, name) is not None:
                checked_count(name, getattr(self, name))
        checked_count("prefix_bytes", self.prefix_bytes, 0)
        checked_kind("speculation", self.speculation, Speculation | None, "a Speculation or None")


__all__ = ["CHUNK", "PREFIX_BYTES", "Settings"]
