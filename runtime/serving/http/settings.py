"""The bounds of an HTTP server."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpSettings:
    """The bounds of an HTTP server.

    Attributes:
        most_bytes: largest body, in bytes.
        read_seconds: most seconds for a client to send a body.
        request_seconds: most seconds for a request, waiting included; None for no limit.
        drain_seconds: seconds that running requests get when the server is told to stop.
        keys: API keys; none lets everybody in.
        requests: most requests at a time, those in the queue included.
        header_seconds: most seconds for a client to send the headers of a request.
        stall_seconds: most seconds for which a client may leave its answer unread.
    """

    most_bytes: int = 4 << 20
    read_seconds: float = 30
    request_seconds: float | None = 600
    drain_seconds: float = 30
    keys: tuple[str, ...] = ()
    requests: int = 1024
    header_seconds: float = 10
    stall_seconds: float = 30


__all__ = ["HttpSettings"]
