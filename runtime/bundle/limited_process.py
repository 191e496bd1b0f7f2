"""Run a script in a process of its own, which limits its time and memory, on input that is not trusted."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError


def run_limited(script: str, packages: Sequence[str], seconds: int, request: Mapping[str, Any]) -> dict[str, Any]:
    """Run a script and return its answer.

    The script reads JSON from standard input: ``request`` with ``path`` (directories to import from) and ``seconds``
    (of CPU time). It sets its limits and writes its answer as JSON to standard output, with ``error`` if it fails.

    Args:
        script: the script's path; it runs without site packages.
        packages: the packages that it imports.
        seconds: the most CPU time that it may use.
        request: what it works on.

    Returns:
        The script's answer, or an ``error`` if it was killed at a limit.

    Raises:
        DynexportError: when the process cannot start, or does not end.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", script],
            input=json.dumps({"path": import_paths(packages), "seconds": seconds, **request}).encode(),
            capture_output=True,
            timeout=10 * seconds,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DynexportError(f"{Path(script).name}: the process failed: {error}") from error
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        # Killed at a limit, mostly before it could report it.
        answer = {"error": f"it takes more than {seconds} s, or too much memory"}
    return answer


def import_paths(packages: Sequence[str]) -> list[str]:
    """Return the directories that packages are imported from, for a process that runs without site packages."""
    found = [spec.origin for name in packages if (spec := find_spec(name)) and spec.origin]
    return sorted({str(Path(origin).parent.parent) for origin in found})


__all__ = ["import_paths", "run_limited"]
