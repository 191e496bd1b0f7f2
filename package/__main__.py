"""Run the command line: ``dynexport``, and ``python -m dynexport``."""

import signal
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; exit code 0 is success, 1 a failed check, 2 wrong usage or input."""
    try:
        # Imported here, so that Ctrl-C during the import (about a second) ends without a traceback, too.
        from dynexport.exporter.cli.main import main as command_line
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(128 + signal.SIGINT)
    command_line()


if __name__ == "__main__":
    main()
