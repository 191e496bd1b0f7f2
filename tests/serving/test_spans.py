"""Spans: one for each request, with its numbers and without its texts."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest
from requests_of_tests import CHUNK, Inbox, model_of, work

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.spans import Spans, otlp_provider
from dynexport.runtime.serving.work import Failure

ATTRIBUTES = {
    "gen_ai.request.model",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
    "gen_ai.response.finish_reasons",
    "gen_ai.latency.time_in_queue",
    "gen_ai.latency.time_to_first_token",
    "dynexport.depth",
    "dynexport.answers",
    "dynexport.reused_tokens",
    "dynexport.layers_per_token",
    "dynexport.end",
}
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("form", ["skip", "mod", "radial-step"])
def test_a_request_is_a_span(form: str) -> None:
    sdk: Any = pytest.importorskip("opentelemetry.sdk.trace")
    export: Any = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory: Any = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    exporter, provider = memory.InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    model = model_of(form)
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK), Spans("tiny", model.bundle.manifest, provider))
    inboxes = [Inbox() for _ in range(3)]
    works = [work(model, PROMPT, 5, inbox, n=n) for inbox, n in zip(inboxes, (2, 1, 1), strict=True)]
    submitted = time.time_ns()
    for each in works:
        each.arrived = time.monotonic()
        scheduler.add(each)
    works[1].cancelled = True  # it waits
    while scheduler.waiting:
        scheduler.step()
    scheduler.end_all(Failure("closed", "the server stops"))

    cancelled, first, closed = exporter.get_finished_spans()
    assert [span.attributes["dynexport.end"] for span in (cancelled, first, closed)] == [
        "cancelled",
        "length",
        "closed",
    ]
    assert first.attributes["gen_ai.request.model"] == "tiny"
    assert first.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert first.attributes["gen_ai.usage.output_tokens"] == sum(map(len, inboxes[0].tokens.values())) == 10
    assert first.attributes["gen_ai.response.finish_reasons"] == ("length", "length")
    layers = [one.layers for delivery in inboxes[0].deliveries for one in delivery.answered]
    if form != "radial-step":  # there a layer counts at every visit
        assert first.attributes["dynexport.layers_per_token"] == sum(layers[2:]) / 8
    assert [event.name for event in first.events] == ["started", "first token"]
    assert abs(first.start_time - submitted) < 1e9
    assert first.end_time > first.start_time
    assert [len(span.events) for span in (cancelled, closed)] == [0, 1]
    names = {name for span in (cancelled, first, closed) for name in span.attributes}
    assert names <= ATTRIBUTES, "none of them holds a text"


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.trace", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DynexportError, match=r"is not installed: pip install 'dynexport\[otel\]'"):
        Spans("tiny", model_of("skip").bundle.manifest)
    with pytest.raises(DynexportError, match=r"is not installed: pip install 'dynexport\[otel\]'"):
        otlp_provider()
