"""The timing cache: TensorRT's kernel measurements on a GPU, kept for all bundles of this user."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.atomic import write_file

# These files are native and trusted, so they are stored outside of bundles, which are untrusted.
_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111 - without a home too
HOME = Path(_CACHE) / "dynexport"


def timing_file(version: str, gpu: str) -> Path:
    """Return the path of the timing cache for a TensorRT version and GPU model."""
    return HOME / f"tensorrt-{version}-{hashlib.sha256(gpu.encode()).hexdigest()[:12]}.timing"


def use_timings(config: Any, path: Path) -> None:
    """Use the stored measurements for a build; an unreadable file is ignored."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    cache = config.create_timing_cache(content) or config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)


def keep_timings(config: Any, path: Path) -> None:
    """Store the measurements of a build; if they cannot be written, the next build measures again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, bytes(config.get_timing_cache().serialize()))
