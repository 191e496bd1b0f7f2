"""Read the lines of a file whose lines may have any length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_SKIPPED = 1 << 20  # bytes read at a time from a line that is too long


@dataclass(frozen=True)
class Line:
    """One line of a file.

    Attributes:
        number: its number, from 1.
        start: its offset in the file, in bytes.
        content: its bytes without the line break; None if it is too long.
        whole: true if it ends with a line break.
    """

    number: int
    start: int
    content: bytes | None
    whole: bool


def bounded_lines(file: BinaryIO, most: int) -> Iterator[Line]:
    """Yield the lines of a file from its current position; at most ``most`` bytes of a line are in memory."""
    number, start = 0, 0
    while first := file.readline(most + 1):
        number += 1
        last, length = first, len(first)
        while len(first) > most and not last.endswith(b"\n") and (more := file.readline(_SKIPPED)):
            last, length = more, length + len(more)
        whole = last.endswith(b"\n")
        kept = length - whole <= most
        yield Line(number, start, first.removesuffix(b"\n") if kept else None, whole)
        start += length


__all__ = ["Line", "bounded_lines"]
