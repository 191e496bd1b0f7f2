"""The machine that a measurement was made on."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from pathlib import Path

from pydantic import BaseModel


class Machine(BaseModel):
    """Hardware and versions that are reported with a measurement."""

    cpu: str
    cores: int
    memory_bytes: int
    system: str
    python: str
    onnxruntime: str

    @classmethod
    def this(cls) -> Machine:
        """Return the description of this machine."""
        import onnxruntime

        return cls(
            cpu=_cpu_name(),
            cores=available_cores(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            system=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            onnxruntime=onnxruntime.__version__,
        )


def available_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> int:
    """Return the peak resident memory of this process, in bytes."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    # Only the fallback: on Linux, ru_maxrss of a child process includes the peak of its parent.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory() -> None:
    """Reset the peak memory of this process, if the system supports it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
