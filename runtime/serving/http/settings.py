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
        connections: most connections.
    """

    most_bytes: int = 4 << 20
    read_seconds: float = 30
    request_seconds: float | None = 600
    drain_seconds: float = 30
    keys: tuple[str, ...] = ()
    connections: int = 1024


__all__ = ["HttpSettings"]
