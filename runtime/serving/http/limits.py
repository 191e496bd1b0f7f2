"""Middleware that limits requests before the app sees them: their number, bytes and seconds, and API keys."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynexport.runtime.serving.http.errors import ApiError, unavailable

# A body that is too large is still read up to this many times its limit, so that its client reads the answer.
_READ_FURTHER = 8


class Crowd:
    """Middleware that bounds the number of requests at a time.

    Args:
        app: the app.
        most: most requests at a time.
        always: the paths that are always answered.
    """

    def __init__(self, app: ASGIApp, most: int, always: Collection[str]) -> None:
        self._app, self._most, self._always = app, most, always
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http" or scope["path"] in self._always:
            await self._app(scope, receive, send)
            return
        if self._requests >= self._most:
            error = unavailable(
                f"server: expected at most {self._most} requests at a time, found more; try again later"
            )
            await error.response()(scope, receive, send)
            return
        self._requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1


class ApiKeys:
    """Middleware that asks for an API key.

    Args:
        app: the app.
        keys: the keys; none asks for nothing.
        free: the paths that need no key.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], free: Collection[str]) -> None:
        self._app, self._free = app, free
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "http" and self._keys and scope["path"] not in self._free:
            given = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = given.partition(b" ")
            digest = _digest(key.strip())
            # All keys are compared, each in constant time, so that the time says nothing about them.
            known = sum(hmac.compare_digest(digest, key) for key in self._keys)
            if not known or scheme.lower() != b"bearer":
                error = ApiError(
                    401,
                    "Incorrect API key provided" if given else "You didn't provide an API key",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


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
            message = f"body: expected all of it within {self._seconds:g} s"
            error = ApiError(408, message, "timeout_error", code="request_timeout")
        except ApiError as refused:
            error = refused
        else:
            if body is not None:
                await self._app(scope, _then(body, receive), send)
            return
        error.headers["Connection"] = "close"  # the rest of the body is not read
        await error.response()(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client has hung up.

        Raises:
            ApiError: for a body that is too large.
        """
        headers = dict(scope["headers"])
        declared = int(headers.get(b"content-length", b"0")[:20])
        # A client that asks first does not send a body that is refused.
        if declared > self._most and (declared > self._most * _READ_FURTHER or b"expect" in headers):
            raise self._too_large()
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > self._most * _READ_FURTHER:
                raise self._too_large()
            if size <= self._most:
                body += part
        if size > self._most:
            raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"body: expected at most {self._most} bytes, found more", code="request_too_large")


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


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


__all__ = ["ApiKeys", "BodyLimit", "Crowd"]
