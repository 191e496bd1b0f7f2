"""Processor time that other processes took while something was measured."""

from __future__ import annotations

import os
import time
from pathlib import Path


class OtherWork:
    """Counts what disturbs a measurement: the processor time of processes that do not belong to it.

    Args:
        processes: ids of processes that belong to the measurement, besides this one.
    """

    def __init__(self, *processes: int) -> None:
        self._processes = processes
        self._begun = self._now()

    def taken(self) -> tuple[float, float | None]:
        """Return (processor seconds that the machine had, those that others took) until now.

        The second is None on a system without /proc. It is exact to some clock ticks, so it may be negative.
        """
        seconds, busy, own = (late - early for early, late in zip(self._begun, self._now(), strict=True))
        return seconds * (os.cpu_count() or 1), busy - own if Path("/proc/stat").exists() else None

    def share(self) -> float | None:
        """Return the share of the machine's processors that others took until now, 0 to 1; None as for ``taken``."""
        available, others = self.taken()
        return None if others is None else share_of(others, available)

    def _now(self) -> tuple[float, float, float]:
        """Return seconds of the clock, of all processors and of the own processes."""
        own = time.process_time()
        try:
            machine = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return time.perf_counter(), 0, own
        ticks = os.sysconf("SC_CLK_TCK")
        for pid in self._processes:
            # The name of the program, in parentheses, may contain spaces.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            own += (int(fields[11]) + int(fields[12])) / ticks
        idle = machine[3] + machine[4]
        return time.perf_counter(), (sum(machine) - idle) / ticks, own


def share_of(others: float, available: float) -> float:
    """Return processor seconds as a share of those that the machine had, 0 to 1."""
    return min(1.0, max(0.0, others / available))


__all__ = ["OtherWork", "share_of"]
