"""The app: its routes, and what guards them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

from anyio import to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse

from dynexport.runtime.serving.http import asking, documented, page
from dynexport.runtime.serving.http.answering import Answer, Kind, event
from dynexport.runtime.serving.http.asking import Asked
from dynexport.runtime.serving.http.errors import ApiError, add_handlers, of_failure
from dynexport.runtime.serving.http.limits import ApiKeys, BodyLimit, Crowd
from dynexport.runtime.serving.http.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from dynexport.runtime.serving.http.served import Directory
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.submit import answers_async
from dynexport.runtime.serving.work import Delivery

Deliveries: TypeAlias = AsyncGenerator[Delivery, None]
# Paths that are answered without a key and however many requests run: probes and monitoring.
_WATCHED = ("/health", "/ready", "/metrics")
_HUNG_UP = Response(status_code=499)  # nobody reads it


def create_app(
    directory: Directory,
    settings: HttpSettings,
    *,
    expose: Callable[[], tuple[bytes, str]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> FastAPI:
    """Return the app of some models; their workers start and end with it.

    Args:
        directory: the models.
        settings: bounds.
        expose: returns the metrics and their content type; None has no /metrics.
        report: receives one line about each fault of the server.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        for served in directory.models.values():
            served.worker.start()
        yield
        for served in directory.models.values():
            await to_thread.run_sync(served.worker.close)

    app = FastAPI(title="dynexport", lifespan=lifespan, docs_url=None, redoc_url=None, responses=documented.ERRORS)
    add_handlers(app, report)
    _add_models(app, directory)
    _add_completions(app, directory, settings)
    _add_health(app, directory, expose)
    app.include_router(page.router)
    app.add_middleware(BodyLimit, most=settings.most_bytes, seconds=settings.read_seconds)
    app.add_middleware(ApiKeys, keys=settings.keys, free=(*_WATCHED, *page.PATHS))
    app.add_middleware(Crowd, most=settings.requests, always=_WATCHED)
    return app


def _add_completions(app: FastAPI, directory: Directory, settings: HttpSettings) -> None:
    @app.post("/v1/completions", **documented.streaming(documented.Completion))
    async def completions(body: CompletionBody, request: Request) -> Response:
        asked = await to_thread.run_sync(asking.completion, directory, body, settings.request_seconds)
        return await _answer("completion", asked, request)

    @app.post("/v1/chat/completions", **documented.streaming(documented.Chat))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        asked = await to_thread.run_sync(asking.chat, directory, body, settings.request_seconds)
        return await _answer("chat", asked, request)

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(404, "embeddings: this server has language models only; use /v1/completions", code="not_found")


async def _answer(kind: Kind, asked: Asked, request: Request) -> Response:
    """Submit a request and return its answer, or the stream of it."""
    answer, deliveries = Answer(kind, asked), answers_async(asked.served.worker, *asked.works)
    return await _unless_hung_up(request, (_stream if asked.stream else _whole)(answer, deliveries))


async def _stream(answer: Answer, deliveries: Deliveries) -> Response:
    """Return a stream when its first token is there: a request that fails before has a status, not an event."""
    first = await anext(deliveries)
    if first.failure is not None:
        await deliveries.aclose()
        raise of_failure(first.failure)
    return StreamingResponse(_events(answer, first, deliveries), media_type="text/event-stream")


async def _whole(answer: Answer, deliveries: Deliveries) -> Response:
    async with aclosing(deliveries):
        async for delivery in deliveries:
            if delivery.failure is not None:
                raise of_failure(delivery.failure)
            answer.add(delivery)
    return JSONResponse(answer.body())


async def _events(answer: Answer, first: Delivery, deliveries: Deliveries) -> AsyncIterator[bytes]:
    """Yield the events of an answer; a client that hangs up closes this, which cancels the request."""
    async with aclosing(deliveries):
        for part in (*answer.opening(), *answer.events(first)):
            yield part
        async for delivery in deliveries:
            for part in answer.events(delivery):
                yield part
            if delivery.failure is not None:
                yield event(of_failure(delivery.failure).body)
                return
        for part in answer.closing():
            yield part


async def _unless_hung_up(request: Request, answering: Coroutine[Any, Any, Response]) -> Response:
    """Return an answer; cancel it if the client hangs up before."""
    task = asyncio.create_task(answering)
    gone = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return _HUNG_UP
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_models(app: FastAPI, directory: Directory) -> None:
    @app.get("/v1/models", response_model=documented.Models)
    async def models() -> dict[str, Any]:
        entries = [entry for served in directory.models.values() for entry in served.described()]
        return {"object": "list", "data": entries}

    @app.get("/v1/models/{name:path}", response_model=documented.ServedModel)
    async def model(name: str) -> dict[str, Any]:
        served, _ = directory.find(name)
        return next(entry for entry in reversed(served.described()) if entry["id"] in (name, served.name))

    @app.post("/tokenize", response_model=documented.Tokens)
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        served, _ = directory.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "prompt: expected it or messages, found both or none", param="prompt")

        def tokens() -> list[int]:
            if body.messages is not None:
                return asking.chat_tokens(served, body.messages)
            return served.model.text.encode(body.prompt or "", add_special_tokens=body.add_special_tokens)

        found = await to_thread.run_sync(tokens)
        return {"tokens": found, "count": len(found), "max_model_len": served.worker.scheduler.tokens}

    @app.post("/detokenize", response_model=documented.Detokenized)
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        served, _ = directory.find(body.model)
        text = await to_thread.run_sync(lambda: served.model.text.decode(body.tokens, skip_special_tokens=False))
        return {"prompt": text}


def _add_health(app: FastAPI, directory: Directory, expose: Callable[[], tuple[bytes, str]] | None) -> None:
    def status(good: str, problems: dict[str, str]) -> Response:
        if problems:
            return JSONResponse({"status": "not ready", "problems": problems}, 503)
        return JSONResponse({"status": good})

    @app.get("/health", response_model=documented.Health, responses={503: {"model": documented.Health}})
    async def health() -> Response:
        workers = {name: served.worker for name, served in directory.models.items()}
        return status("ok", {name: worker.problem for name, worker in workers.items() if worker.dead})

    @app.get("/ready", response_model=documented.Ready, responses={503: {"model": documented.Ready}})
    async def ready() -> Response:
        problems = {name: served.worker.problem for name, served in directory.models.items()}
        return status("ready", {name: problem for name, problem in problems.items() if problem})

    if expose is not None:

        @app.get("/metrics", response_class=PlainTextResponse)
        async def metrics() -> Response:
            content, kind = await to_thread.run_sync(expose)
            return Response(content, media_type=kind)


__all__ = ["create_app"]
