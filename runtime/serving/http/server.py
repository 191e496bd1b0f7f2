"""Run the app until the process is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Collection, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from dynexport.runtime.bundle.errors import DynexportError, require_module
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.worker import Worker

if TYPE_CHECKING:
    import uvicorn

# Largest request line and headers together, in bytes.
_MOST_HEADERS = 64 << 10
# Bytes of an answer that the system holds for a client that does not read.
_SEND_BUFFER = 256 << 10
# Seconds for clients to read the end of their answers after the workers have stopped.
_LAST_WORDS = 5


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
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        bound.bind((host, port))
    except (OSError, OverflowError, UnicodeError) as error:
        raise DynexportError(f"--host {host} --port {port}: expected a free address, found: {error}") from error
    return bound


def serve(
    workers: Mapping[str, Worker],
    settings: HttpSettings,
    bound: socket.socket,
    *,
    expose: Callable[[], tuple[bytes, str]] | None = None,
    on_start: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve models until SIGTERM or SIGINT; running requests then get ``drain_seconds`` to finish.

    Args:
        workers: a worker per name.
        settings: bounds.
        bound: the socket to listen on.
        expose: returns the metrics and their content type.
        on_start: called when the server listens.
        report: receives one line about each fault of the server.

    Raises:
        DynexportError: without the packages of the extra ``serve``, for a bundle with unusable sampling options, or
            when the workers of all models have ended by an error.
    """
    require_packages()
    from dynexport.runtime.serving.http.app import create_app
    from dynexport.runtime.serving.http.served import Directory, Served

    directory = Directory({name: Served.of(name, worker) for name, worker in workers.items()})
    app = create_app(directory, settings, expose=expose, report=report)
    # Its warnings say only that clients have hung up while their answers were written.
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    make_server(app, settings, list(workers.values()), on_start).run(sockets=[bound])
    if all(worker.dead for worker in workers.values()):
        raise DynexportError("the workers of all models have ended by an error; start the server again")


def make_server(
    app: Any, settings: HttpSettings, workers: Collection[Worker], on_start: Callable[[], None] = lambda: None
) -> uvicorn.Server:
    """Return a uvicorn server with dynexport's bounds, which lets the workers' requests finish when it stops.

    It also stops when all workers have ended by an error.

    Args:
        app: the app.
        settings: bounds.
        workers: the workers of the app's models.
        on_start: called when the server listens.
    """
    import uvicorn

    from dynexport.runtime.serving.http.connection import connection_class

    class Server(uvicorn.Server):
        """A server that drains its workers."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_start()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            draining = asyncio.create_task(_close(workers, settings.drain_seconds))
            await super().shutdown(sockets)
            await _close(workers, 0)  # nobody waits for what is left
            await draining

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or all(worker.dead for worker in workers)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # uvicorn would raise the signal again at its end; a server that was told to stop has done its work.
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    config = uvicorn.Config(
        app,
        http=connection_class(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",  # its other lines may quote requests
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=_MOST_HEADERS,
        timeout_graceful_shutdown=round(settings.drain_seconds) + _LAST_WORDS,
    )
    return Server(config)


async def _close(workers: Collection[Worker], seconds: float) -> None:
    await asyncio.gather(*(asyncio.to_thread(worker.close, seconds) for worker in workers))


__all__ = ["bind", "make_server", "require_packages", "serve"]
