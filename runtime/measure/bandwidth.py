"""Read bandwidth of memory at the size of a working set: the limit of a decode step that only waits for its weights."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Bandwidth does not change any more at several times the last-level cache; larger buffers would only take memory.
_LARGEST, _TIMES_CACHE = 512 << 20, 4
# Small sizes are read several times, so that starting the threads does not count.
_READ, _MOST_PASSES, _ROUNDS = 128 << 20, 1000, 3


def last_level_cache() -> int | None:
    """Return the bytes of the first core's last-level cache; None where the system does not tell them."""
    found = []
    for cache in _CACHES.glob("index*"):
        try:
            level, size = (cache / "level").read_text(), (cache / "size").read_text()
        except OSError:
            continue
        if match := re.fullmatch(r"(\d+)([KMG]?)", size.strip()):
            found.append((int(level), int(match[1]) * _UNITS[match[2]]))
    return max(found)[1] if found else None


class ReadBandwidth:
    """Threads that read memory as fast as they can.

    Args:
        threads: number of threads; each reads its own part.

    Attributes:
        cache: bytes of the last-level cache, or None.
    """

    def __init__(self, threads: int) -> None:
        self.cache = last_level_cache()
        self._largest = max(_LARGEST, _TIMES_CACHE * (self.cache or 0))
        self._pool = ThreadPoolExecutor(threads)
        self._parts = [np.ones(0, np.int64)] * threads

    def measure(self, size: int) -> float:
        """Return bytes per second of reading ``size`` bytes again and again; the best of a few rounds."""
        each = max(1, min(size, self._largest) // 8 // len(self._parts))
        if each > len(self._parts[0]):
            self._parts = [np.ones(each, np.int64) for _ in self._parts]
        parts = [part[:each] for part in self._parts]
        read = 8 * each * len(parts)
        passes = min(_MOST_PASSES, -(-_READ // read))
        rates = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            list(self._pool.map(_read, parts, [passes] * len(parts)))
            rates.append(passes * read / (time.perf_counter() - start))
        return max(rates)


def _read(part: np.ndarray, passes: int) -> None:
    for _ in range(passes):
        part.max()  # vectorised, and NumPy releases the interpreter's lock


def fits(size: float, cache: int | None) -> bool | None:
    """Return whether a working set fits a cache of so many bytes; None if the cache is unknown."""
    return None if cache is None else size <= cache


__all__ = ["ReadBandwidth", "fits", "last_level_cache"]
