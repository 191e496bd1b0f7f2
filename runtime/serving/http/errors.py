"""Errors in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from dynexport.runtime.bundle.errors import DynexportError, one_line
from dynexport.runtime.serving.http.protocol import UNSUPPORTED
from dynexport.runtime.serving.work import Failure
from dynexport.runtime.serving.worker import Closed, QueueFull

_RETRY = {"Retry-After": "1"}
# Fields of a request by the name that the runtime's errors begin with.
_FIELDS = {"schema": "response_format", "min_new_tokens": "min_tokens", "max_new_tokens": "max_tokens"}
_LONGEST_NAME = 100


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
        named = param and one_line(param)[:_LONGEST_NAME]
        self.body = {"error": {"message": one_line(message), "type": kind, "param": named, "code": code}}

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def of_error(error: DynexportError) -> ApiError:
    """Return the answer to a request that dynexport refuses."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), "rate_limit_error", code="rate_limit_exceeded", headers=_RETRY)
    if isinstance(error, Closed):
        return unavailable(str(error))
    field = re.match(r"([a-z_]+)(\[\d+\])*(\.[a-z_]+)*:", str(error))
    return ApiError(400, str(error), param=field and _FIELDS.get(field[1], field[0][:-1]))


def of_failure(failure: Failure) -> ApiError:
    """Return the answer to a request that ended without all of its answers."""
    if failure.reason == "timeout":
        return ApiError(408, failure.message, "timeout_error", code="request_timeout")
    if failure.reason == "closed":
        return unavailable(failure.message)
    return ApiError(500, failure.message, "server_error", code=failure.reason)


def unavailable(message: str) -> ApiError:
    """Return the answer to a request that another server, or this one later, can answer."""
    return ApiError(503, message, "server_error", code="server_unavailable", headers=_RETRY)


def of_validation(error: RequestValidationError | ValidationError, body: Any = None) -> ApiError:
    """Return the answer to a body that is not as its model says: the first thing that is wrong, by its field.

    Args:
        error: what is wrong.
        body: the body, as JSON values.
    """
    found = [{**one, "place": _place(one["loc"], body)} for one in error.errors()]
    kind, place = found[0]["type"], found[0]["place"]
    if kind == "json_invalid":
        return ApiError(400, "body: expected JSON, found something else", code="invalid_json")
    if not place:
        expected = "a JSON object, with the header Content-Type: application/json"
        if kind == "value_error":
            expected = found[0]["ctx"]["error"]
        return ApiError(400, f"body: expected {expected}", code="invalid_json")
    if place in UNSUPPORTED:
        message = f"{place}: not supported by this server; leave it out"
        return ApiError(400, message, param=place, code="unsupported_parameter")
    if kind == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {place}", param=place, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"you must provide a {place} parameter", param=place, code="missing_required_parameter")
    # A field of several types has an error for each of them.
    messages = dict.fromkeys(_message(one) for one in found if one["place"] == place)
    return ApiError(400, f"{place}: expected {' or '.join(messages)}", param=place)


def _place(loc: Sequence[int | str], body: Any) -> str:
    """Return where a value is in a body; the names of a union's types are left out."""
    parts = [part for part in loc if part not in ("body", "query", "path")]
    place, value = "", body
    for index, part in enumerate(parts):
        if isinstance(part, int):
            place += f"[{part}]"
        elif isinstance(value, dict) or index == 0:
            place += f".{part}" if place else part
        else:
            continue
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
    return place


def _message(found: Mapping[str, Any]) -> str:
    """Return what pydantic expected, with a number or constant that it found instead; text is not repeated."""
    expected = re.sub(r"^(Input|Value|List|Dictionary|String) should (be|have|match) ", "", found["msg"])
    expected = re.sub(r"^(greater|less)", r"a number \1", expected)
    value = found.get("input")
    return f"{expected}, found {value}" if isinstance(value, bool | int | float) else expected


def add_handlers(app: FastAPI, report: Callable[[str], None]) -> None:
    """Make an app answer every error in OpenAI's form.

    Args:
        app: the app.
        report: receives one line about an error that is a fault of the server. It never quotes the request.
    """

    def handler(to: Callable[[Any], ApiError]) -> Callable[[Request, Any], Awaitable[JSONResponse]]:
        async def handle(request: Request, error: Any) -> JSONResponse:
            return to(error).response()

        return handle

    def of_fault(error: Exception) -> ApiError:
        report(f"internal error: {type(error).__name__}{_where(error)}")
        return ApiError(500, "internal error", "server_error", code="internal_error")

    app.add_exception_handler(ApiError, handler(lambda error: error))
    app.add_exception_handler(DynexportError, handler(of_error))
    app.add_exception_handler(RequestValidationError, handler(lambda error: of_validation(error, error.body)))
    app.add_exception_handler(HTTPException, handler(_of_http))
    app.add_exception_handler(Exception, handler(of_fault))


def _where(error: BaseException) -> str:
    """Return the place in the code where an error was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"


def _of_http(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "path: this server has none of this name; see /openapi.json", code="not_found")
    if error.status_code == 400:
        return ApiError(400, "body: expected JSON, found something else", code="invalid_json")
    return ApiError(error.status_code, str(error.detail), headers=error.headers)


__all__ = ["ApiError", "add_handlers", "of_error", "of_failure", "of_validation", "unavailable"]
