"""How long a cold start takes: from the start of the process to the first token."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydantic import BaseModel


class Startup(BaseModel):
    """Times of a start, in seconds.

    Attributes:
        begin_seconds: from the start of the process until it opens the bundle: the interpreter and imports. None where
            the system does not tell when a process started, like ``first_token_seconds``.
        load_seconds: opening the bundle and loading the graphs of a prompt and of a decode step.
        first_token_seconds: from the start of the process to the first token after a prompt.
        page_cache_share: share of the bundle's files that was in memory before, 0 to 1; None where the system does not
            tell. At 1 nothing was read from a disk.
    """

    begin_seconds: float | None
    load_seconds: float
    first_token_seconds: float | None
    page_cache_share: float | None


class StartClock:
    """Takes the times of this process's start; made before the bundle is opened.

    Args:
        bundle: the bundle's directory.
    """

    def __init__(self, bundle: Path) -> None:
        files = sorted(path for path in bundle.glob("*") if path.is_file()) if bundle.is_dir() else []
        self._cached, self._begun, self._opened = page_cache_share(files), process_seconds(), time.perf_counter()
        self._load = 0.0

    def loaded(self) -> None:
        """Take the time at which everything is loaded."""
        self._load = time.perf_counter() - self._opened

    def first_token(self) -> Startup:
        """Return the times of a start whose first token is there now."""
        return Startup(
            begin_seconds=self._begun,
            load_seconds=self._load,
            first_token_seconds=process_seconds(),
            page_cache_share=self._cached,
        )


def process_seconds() -> float | None:
    """Return the seconds since this process started, to a hundredth; None where the system does not tell."""
    try:
        # Fields after the program's name in parentheses; the 20th is the start in clock ticks since the boot.
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def page_cache_share(files: Iterable[Path]) -> float | None:
    """Return the share of files' pages that the system holds in memory; None where it does not tell, or no file."""
    held = pages = 0
    for path in files:
        with suppress(OSError, ValueError), path.open("rb") as file:  # an empty file cannot be mapped
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                found = _resident(memory)
            if found is None:
                return None
            held, pages = held + int(found.sum()), pages + len(found)
    return held / pages if pages else None


def _resident(memory: mmap.mmap) -> np.ndarray | None:
    """Return for each page of a mapping whether it is in memory, uint8 [pages]; None where the system cannot tell."""
    found = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
    view = np.frombuffer(memory, np.uint8)  # its address; the mapping cannot be closed before it is gone
    try:
        ask = ctypes.CDLL(None).mincore
    except (AttributeError, OSError):
        return None
    ask.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p
    if ask(view.ctypes.data, len(memory), found.ctypes.data):
        return None
    return found & 1


__all__ = ["StartClock", "Startup", "page_cache_share", "process_seconds"]
