"""A server with the page and answers made to order: it fails, waits or is hostile on demand, as no real one does."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dynexport.runtime.serving.http.page import router

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>&lt;b&gt;"
DEEP = {
    "id": "deep",
    "layers": 30,
    "depths": [{"name": "2", "ratio": 2.0, "layers": 15}, {"name": "keep", "ratio": None, "layers": 20}],
}
TRAINED = {
    "id": "trained",
    "layers": 8,
    "depths": [
        {"name": "full", "ratio": 1.0, "layers": 8, "trained": True},
        {"name": "2", "ratio": 2.0, "layers": 4, "trained": True},
    ],
}
MARKUP = "<b>&lt;model</b>"
# Question -> how it is refused: status, message, headers.
REFUSALS = {
    "full": (429, "The queue is full.", {"Retry-After": "7"}),
    "long": (413, "body: expected at most 100 bytes", None),
    "draining": (503, f"{MARKUP}: the server is shutting down", None),
}
# (text, layers) of each token.
ANSWER = [("It", 30), (" is", 15), (" a", 15), (" dag", 7), ("ger", 15), (".", 30)]


class FakeServer:
    """Requests of the page, and how they are answered.

    Attributes:
        bodies: the JSON bodies of chat requests.
        models: the data of /v1/models.
        key: the API key that requests need, or None.
        hung_up: set when the client leaves a stream before its end.
        pause: seconds between two tokens.
    """

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = [DEEP, {**DEEP, "id": "deep@2"}, {"id": "plain"}, {"id": MARKUP}, TRAINED]
        self.key: str | None = None
        self.hung_up = threading.Event()
        self.pause = 0.0
        self.app = FastAPI()
        self.app.include_router(router)
        self.app.add_api_route("/v1/models", self.list_models)
        self.app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])

    def list_models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"object": "list", "data": self.models})

    def refused(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error("Incorrect API key.", 401)

    async def chat(self, request: Request) -> Response:
        if (refused := self.refused(request)) is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if question in REFUSALS:
            status, message, headers = REFUSALS[question]
            return error(message, status, headers)
        if question == "no json":
            return Response("<h1>Bad gateway</h1>", 502, media_type="text/html")
        stream = pieces() if question == "in pieces" else self.stream(question)
        return StreamingResponse(stream, media_type="text/event-stream")

    async def stream(self, question: str) -> AsyncIterator[str]:
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        tokens: list[tuple[str, Any]] = [(HOSTILE, 30)] if question == "hostile" else ANSWER
        if question == "together":
            tokens = [("It is", [30, 7]), ("", []), (" a", [15])]
        if question in ("endless", "in length"):
            tokens = ANSWER * (1000 if question == "endless" else 50)
        try:
            for number, (text, layers) in enumerate(tokens):
                await asyncio.sleep(0.01 if question == "endless" else self.pause)
                if question == "breaks" and number == 3:
                    yield event({"error": {"message": "The engine failed."}})
                    return
                if question == "hangs up" and number == 3:
                    raise ConnectionAbortedError("as if the server were killed")
                choice: dict[str, Any] = {"index": 0, "delta": {"content": text}, "finish_reason": None}
                if question != "untold":
                    choice["layers"] = layers
                yield event({"choices": [choice]})
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        yield event({"choices": [], "usage": {"completion_tokens": len(tokens)}})
        yield "data: [DONE]\n\n"


def error(message: str, status: int, headers: dict[str, str] | None = None) -> Response:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error"}}, status, headers)


async def pieces() -> AsyncIterator[bytes]:
    """A stream that arrives in pieces of seven bytes, which end within lines and characters; its lines end as CRLF."""
    texts = ("Öl", ", ключ", ", 鍵")
    events = [{"choices": [{"index": 0, "delta": {"content": text}, "layers": 15}]} for text in texts]
    lines = [f"data: {json.dumps(content, ensure_ascii=False)}\r\n\r\n" for content in events]
    content = ": a comment\r\n\r\n{}data: [DONE]\r\n\r\n".format("".join(lines)).encode()
    for start in range(0, len(content), 7):
        yield content[start : start + 7]
        await asyncio.sleep(0.001)


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
