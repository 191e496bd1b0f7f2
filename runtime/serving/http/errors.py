"""Errors in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dynexport.runtime.bundle.errors import DynexportError, one_line
from dynexport.runtime.serving.work import Failure
from dynexport.runtime.serving.worker import Closed, QueueFull

_RETRY_SECONDS = "1"


class ApiError(Exception):
    """An answer with an error.

    Args:
        status: the HTTP status.
        message: one line.
        kind: OpenAI's ``type``.
        param: the field that is wrong.
        code: OpenAI's ``code``.
        headers: further headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body = {"error": {"message": one_line(message), "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def of_error(error: DynexportError) -> ApiError:
    """Return the answer to a request that dynexport refuses."""
    retry = {"Retry-After": _RETRY_SECONDS}
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=retry)
    if isinstance(error, Closed):
        return ApiError(503, str(error), "server_error", code="server_unavailable", headers=retry)
    field = re.match(r"([a-z_]+):", str(error))
    return ApiError(400, str(error), param=field and field[1])


def of_failure(failure: Failure) -> ApiError:
    """Return the answer to a request that ended without all of its answers."""
    if failure.reason == "timeout":
        return ApiError(408, failure.message, "timeout_error", code="request_timeout")
    if failure.reason == "closed":
        return ApiError(503, failure.message, "server_error", code="server_unavailable")
    return ApiError(500, failure.message, "server_error", code=failure.reason)


def of_validation(error: RequestValidationError | ValidationError) -> ApiError:
    """Return the answer to a body that is not as its model says: the first thing that is wrong, by its field."""
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"] if part not in ("body", "query", "path"))
    if found["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {place}", param=place, code="unknown_parameter")
    if found["type"] == "json_invalid":
        return ApiError(400, "body: expected JSON, found something else", code="invalid_json")
    if not place:
        message = "body: expected a JSON object, with the header Content-Type: application/json"
        return ApiError(400, message, code="invalid_json")
    return ApiError(400, f"{place}: {found['msg']}", param=place)


def add_handlers(app: FastAPI) -> None:
    """Make an app answer every error in OpenAI's form."""

    def handler(to: Callable[[Any], ApiError]) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
        async def handle(request: Request, error: Any) -> JSONResponse:
            return to(error).response()

        return handle

    app.add_exception_handler(ApiError, handler(lambda error: error))
    app.add_exception_handler(DynexportError, handler(of_error))
    app.add_exception_handler(RequestValidationError, handler(of_validation))
    app.add_exception_handler(HTTPException, handler(_of_http))
    app.add_exception_handler(Exception, handler(lambda error: ApiError(500, "internal error", "server_error")))


def _of_http(error: HTTPException) -> ApiError:
    if error.status_code == 400:  # FastAPI could not read the body: it is not UTF-8, or nested too deeply
        return ApiError(400, "body: expected JSON, found something else", code="invalid_json")
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


__all__ = ["ApiError", "add_handlers", "of_error", "of_failure", "of_validation"]
