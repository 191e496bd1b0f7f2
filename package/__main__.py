"""Run the command line: ``dynexport``, and ``python -m dynexport``."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; exit codes: 0 good, 1 a check failed, 2 bad usage or input."""
    try:
        # Here, so that Ctrl-C during the second that imports take is told as at any other moment.
        from dynexport.exporter.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)
    command_line()


if __name__ == "__main__":
    main()
