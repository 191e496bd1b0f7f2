"""Run a command again and again, killed when its output has grown by some lines, until it ends by itself.

The command line is imported once, and each run is a fork of this process. Writes the number of kills.
Usage: killed_runs.py OUTPUT SEED LINES ARGUMENTS..
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from dynexport.exporter.cli.main import main


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed(child: int, output: Path, until: int, delay: float) -> bool:
    """Wait until the output has some lines, and a moment more; kill the child, or say that it has ended before."""
    while lines(output) < until:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def run(output: Path, seed: int, most: int, arguments: list[str]) -> None:
    draw, kills = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            sys.argv = ["dynexport", *arguments]
            main()
        if not killed(child, output, lines(output) + draw.randint(0, most), draw.random() * 0.004):
            break
        kills += 1
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
