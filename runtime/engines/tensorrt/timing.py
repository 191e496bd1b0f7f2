"""The timing cache: what TensorRT has measured of kernels on a GPU, kept for all bundles of this user."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.atomic import write_file

# What is here is native and trusted: it stays out of bundles, which come from elsewhere.
HOME = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynexport"


def timing_file(version: str, gpu: str) -> Path:
    """Where the measurements of a version of TensorRT on a GPU model are kept."""
    return HOME / f"tensorrt-{version}-{hashlib.sha256(gpu.encode()).hexdigest()[:12]}.timing"


def use_timings(config: Any, path: Path) -> None:
    """Give a build what was measured before; an unreadable file is as good as none."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)


def keep_timings(config: Any, path: Path) -> None:
    """Keep what a build measured; where that cannot be written the next build measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, bytes(config.get_timing_cache().serialize()))
