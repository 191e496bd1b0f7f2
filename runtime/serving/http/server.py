"""Run the app until the process is told to stop."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError, require_module
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.worker import Worker

# Largest request line and headers together, in bytes.
_MOST_HEADERS = 64 << 10


def require_packages() -> None:
    """Raise DynexportError if a package of the extra ``serve`` is missing."""
    for name in ("fastapi", "uvicorn"):
        require_module(name, "serve", "serve HTTP")


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; port 0 takes a free one.

    Raises:
        DynexportError: for an address that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise DynexportError(f"--host {host} --port {port}: expected a free address, found: {error}") from error
    return bound


def serve(
    workers: Mapping[str, Worker],
    settings: HttpSettings,
    bound: socket.socket,
    *,
    expose: Callable[[], tuple[bytes, str]] | None = None,
    on_start: Callable[[], None] = lambda: None,
) -> None:
    """Serve models until SIGTERM or SIGINT; running requests then get ``drain_seconds`` to finish.

    Args:
        workers: a worker per name.
        settings: bounds.
        bound: the socket to listen on.
        expose: returns the metrics and their content type.
        on_start: called when requests are served.

    Raises:
        DynexportError: without the packages of the extra ``serve``.
    """
    require_packages()
    import uvicorn

    from dynexport.runtime.serving.http.app import create_app
    from dynexport.runtime.serving.http.served import Directory, Served

    directory = Directory({name: Served.of(name, worker) for name, worker in workers.items()})
    app = create_app(directory, settings, expose=expose, on_start=on_start)
    options: dict[str, Any] = {
        "log_level": "warning",
        "access_log": False,
        "server_header": False,
        "http": "h11",  # it bounds the headers
        "h11_max_incomplete_event_size": _MOST_HEADERS,
        "limit_concurrency": settings.connections,
        "timeout_graceful_shutdown": max(1, round(settings.drain_seconds)),
        "lifespan": "on",
    }
    uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[bound])


__all__ = ["bind", "require_packages", "serve"]
