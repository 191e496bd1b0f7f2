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
from typing import NoReturn

from dynexport.exporter.cli.main import main


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def command(arguments: list[str]) -> NoReturn:
    """Run the command and end this process, without what ends the process that it was forked from."""
    code = 1
    try:
        sys.argv = ["dynexport", *arguments]
        main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child: int, output: Path, until: int, delay: float) -> int:
    """Wait until the output has some lines, and a moment more; kill the child, unless it has ended before."""
    while lines(output) < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(output: Path, seed: int, most: int, arguments: list[str]) -> None:
    draw, kills = random.Random(seed), 0
    while True:
        child = os.fork()
        if child == 0:
            command(arguments)
        code = exit_code(child, output, lines(output) + draw.randint(0, most), draw.random() * 0.004)
        if code != -signal.SIGKILL:
            break
        kills += 1
    sys.stdout.write(f"{kills}\n")
    sys.exit(code)


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
