"""The Python server where a test reaches into it: faults that are planted, and what only it has."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
from live import Live

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.served import Directory
from dynexport.runtime.serving.http.settings import HttpSettings


def test_the_document_says_that_metrics_are_text() -> None:
    app = create_app(Directory({}), HttpSettings(), expose=lambda: (b"", "text/plain"))
    assert list(app.openapi()["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


def test_a_schema_format_without_a_schema_is_refused(live: Live) -> None:
    body = {"model": "small", "prompt": "hello", "response_format": {"type": "json_schema"}}
    found = live.post("/v1/completions", json=body)
    message = "response_format.json_schema.schema: expected a JSON schema"
    assert (found.status_code, found.json()["error"]["message"][: len(message)]) == (400, message)


def test_a_full_queue_is_told_with_when_to_come_back(model: Model) -> None:
    with Live(model, HttpSettings(), rows=1, queue=1) as live:
        held = threading.Event()
        step = live.worker.scheduler.step
        live.worker.scheduler.step = lambda: (held.wait(), step())[1]  # type: ignore[method-assign]
        body = {"model": "small", "prompt": "hello", "max_tokens": 1}
        threads = [
            threading.Thread(target=live.post, args=("/v1/completions",), kwargs={"json": body}) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
            time.sleep(0.1)
        found = live.post("/v1/completions", json=body)
        held.set()
        for thread in threads:
            thread.join()
    assert found.status_code == 429
    assert int(found.headers["retry-after"]) >= 1
    assert found.json()["error"]["code"] == "rate_limit_exceeded"


def test_a_model_that_fails_makes_the_server_unready(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*anything: object, **more: object) -> object:
        raise DynexportError("decoder.onnx: ONNX Runtime failed in a step: no memory")

    with Live(model, HttpSettings(), rows=1) as live:
        body = {"model": "small", "prompt": "hello", "max_tokens": 2}
        with monkeypatch.context() as patch:
            patch.setattr(model.executor, "run", failing)
            for _ in range(3):
                found = live.post("/v1/completions", json=body)
                assert (found.status_code, found.json()["error"]["code"]) == (500, "failed")
        ready = httpx.get(f"{live.address}/ready")
        assert ready.status_code == 503
        assert ready.json()["problems"] == {"small": "the last 3 requests failed"}


def test_a_server_without_a_living_worker_stops(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise MemoryError("no more")

    with Live(model, HttpSettings(), rows=1) as live:
        held = threading.Event()
        monkeypatch.setattr(type(live.worker), "dead", property(lambda worker: held.is_set() and worker._problem != ""))
        live.worker.scheduler.step = broken  # type: ignore[method-assign]
        found = live.post("/v1/completions", json={"model": "small", "prompt": "hello"})
        assert found.status_code == 500
        assert "the worker stopped: MemoryError" in found.json()["error"]["message"]
        assert live.post("/v1/completions", json={"model": "small", "prompt": "hello"}).status_code == 503
        held.set()
        live.thread.join(10)
        assert not live.thread.is_alive()


def test_nan_logits_end_the_request_with_an_error(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = model.executor.decode

    def broken(*given: Any, **more: Any) -> Any:
        return np.full_like(decode(*given, **more), np.nan)

    with Live(model, HttpSettings(), rows=1) as live, monkeypatch.context() as patch:
        patch.setattr(model.executor, "decode", broken)
        found = live.post("/v1/completions", json={"model": "small", "prompt": "hello", "max_tokens": 5})
        assert found.status_code == 500
        assert "NaN" in found.json()["error"]["message"]
        stream = live.post(
            "/v1/completions", json={"model": "small", "prompt": "hello", "max_tokens": 5, "stream": True}
        )
        last = [line for line in stream.text.splitlines() if line][-1]
        assert "NaN" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert live.rows_are_free()
        assert httpx.get(f"{live.address}/ready").status_code == 200
        live.post("/v1/completions", json={"model": "small", "prompt": "hello", "max_tokens": 5})
        assert httpx.get(f"{live.address}/ready").json()["problems"] == {"small": "the last 3 requests failed"}
        patch.undo()
        live.post("/v1/completions", json={"model": "small", "prompt": "hello", "max_tokens": 5})
        assert httpx.get(f"{live.address}/ready").status_code == 200


def test_a_stream_that_waits_is_cancelled_when_its_client_hangs_up(model: Model) -> None:
    with Live(model, HttpSettings(), rows=1) as live:
        held = threading.Event()
        step = live.worker.scheduler.step
        live.worker.scheduler.step = lambda: (held.wait(), step())[1]  # type: ignore[method-assign]
        body = {"model": "small", "prompt": "hello", "max_tokens": 80, "min_tokens": 80, "stream": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.address}/v1/completions", json=body, timeout=0.2)
        time.sleep(0.1)
        held.set()
        assert live.rows_are_free()
        assert live.worker.scheduler.cache.positions.sum() == 0, "nothing has run"


def test_more_requests_than_the_server_takes_are_told(model: Model) -> None:
    with Live(model, HttpSettings(requests=1), rows=1) as live:
        held = threading.Event()
        step = live.worker.scheduler.step
        live.worker.scheduler.step = lambda: (held.wait(), step())[1]  # type: ignore[method-assign]
        body = {"model": "small", "prompt": "hello", "max_tokens": 1}
        thread = threading.Thread(target=live.post, args=("/v1/completions",), kwargs={"json": body})
        thread.start()
        time.sleep(0.2)
        found = live.post("/v1/completions", json=body)
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert httpx.get(f"{live.address}/health").status_code == 200
        held.set()
        thread.join()
