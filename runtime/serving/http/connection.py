"""Limit how long a client's connection may take to send a request's headers and to read its answer."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from dynexport.runtime.serving.http.settings import HttpSettings


def connection_class(settings: HttpSettings) -> type[H11Protocol]:
    """Return uvicorn's connection with time limits that it does not have.

    A connection ends when the headers of a request take longer than ``header_seconds``, or when the client does not
    read for ``stall_seconds`` while its answer waits.

    Args:
        settings: the time limits.
    """

    class Connection(H11Protocol):
        """uvicorn's connection with time limits."""

        _headers: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._time_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._time_headers()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._time_headers(begun=False)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(settings.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _cancel(self._stalled)

        def connection_lost(self, exc: Exception | None) -> None:
            _cancel(self._headers)
            _cancel(self._stalled)
            super().connection_lost(exc)

        def _time_headers(self, begun: bool = True) -> None:
            """Start the time of a request's headers, or end it: a request that runs has its own limits."""
            running = self.cycle is not None and not self.cycle.response_complete
            if running or not begun or self.transport.is_closing():
                _cancel(self._headers)
                self._headers = None
            elif self._headers is None:
                self._headers = self.loop.call_later(settings.header_seconds, self.transport.abort)

    return Connection


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


__all__ = ["connection_class"]
