"""A local Ray for tests, with a key and a folder of its own."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from house import ROOT

SAMPLE = ROOT / "samples" / "ray_serve"
_FOLDER = tempfile.mkdtemp(prefix="ray")  # pytest's folders are too long for the names of sockets
# Some are read when ray is imported.
os.environ |= {
    "PYTHONPATH": f"{SAMPLE}:{os.environ.get('PYTHONPATH', '')}",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_TMPDIR": _FOLDER,
    "RAY_USAGE_STATS_ENABLED": "0",
}

import ray  # noqa: E402


@contextmanager
def local_ray(cpus: int) -> Iterator[str]:
    """Run Ray in child processes of this one; return the address for others.

    Args:
        cpus: the number that Ray counts with; it may exceed the machine's.
    """
    ray.init(num_cpus=cpus, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        shutil.rmtree(_FOLDER)
