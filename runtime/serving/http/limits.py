"""What a request may take before it is read: bytes, seconds, and an API key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynexport.runtime.serving.http.errors import ApiError


class BodyLimit:
    """Middleware that reads a body of bounded size within bounded time, before the app sees the request.

    Args:
        app: the app.
        most: most bytes of a body.
        seconds: most seconds for a client to send it.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(408, f"body: expected all of it within {self._seconds:g} s", "timeout_error")
        except ApiError as refused:
            error = refused
        else:
            if body is not None:
                await self._app(scope, _then(body, receive), send)
            return
        error.headers["Connection"] = "close"  # the rest of the body is not read
        await error.response()(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client has hung up."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._most:
            raise self._too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._most:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._most} bytes", code="request_too_large")


def _then(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that gives a body, and then what the client sends after it."""
    read = False

    async def receiver() -> Message:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiver


class ApiKeys:
    """Middleware that asks for one of some keys where a path begins with one of some names.

    Args:
        app: the app.
        keys: the keys; none asks for nothing.
        paths: the beginnings of the paths that need one.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], paths: Sequence[str]) -> None:
        self._app, self._paths = app, tuple(paths)
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and self._keys and scope["path"].startswith(self._paths):
            given = dict(scope["headers"]).get(b"authorization", b"")
            digest = _digest(given.removeprefix(b"Bearer "))
            # All keys are compared, each in constant time, so that the time says nothing about them.
            if not sum(hmac.compare_digest(digest, key) for key in self._keys):
                error = ApiError(
                    401,
                    "Incorrect API key provided" if given else "You didn't provide an API key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


__all__ = ["ApiKeys", "BodyLimit"]
