"""Compile a JSON schema in a separate process: a script, run by ``constraint.py``, without dynexport imports.

Schemas come with requests and are untrusted. llguidance bounds most of the work, but not all of it: a ``multipleOf`` of
a million has a million states.
"""

from __future__ import annotations

import json
import resource
import sys

MEMORY = 128 << 20  # bytes of address space of the whole process; 28 MiB of them are needed for any schema


def main() -> None:
    """Read a request as JSON from standard input and write the answer as JSON to standard output.

    The request has ``path`` (directories to import from), ``seconds`` (CPU time) and ``grammar``. The answer has
    ``error`` if the grammar is refused.
    """
    request = json.load(sys.stdin)
    sys.path += request["path"]
    import llguidance

    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # Which tokens there are matters little for the time: these are the 256 bytes.
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), request["grammar"], log_level=0)
    json.dump({"error": matcher.get_error()} if matcher.is_error() else {}, sys.stdout)


if __name__ == "__main__":
    main()
