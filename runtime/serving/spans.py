"""OpenTelemetry spans: one for each request, without its texts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dynexport.runtime.bundle.errors import require_module
from dynexport.runtime.execution.decisions import DecisionReader, Decisions
from dynexport.runtime.serving.watch import Unwatched
from dynexport.runtime.serving.work import Answer, Reason, Work

if TYPE_CHECKING:
    from opentelemetry.trace import Span, TracerProvider

    from dynexport.runtime.bundle.manifest import Manifest


def otlp_provider() -> TracerProvider:
    """Return a provider that sends spans by OTLP over HTTP, where the variables of OpenTelemetry (OTEL_..) say.

    It sends in a thread of its own, and the rest when the process ends.

    Raises:
        DynexportError: without the packages of the extra ``otel``.
    """
    sdk, export, otlp = (
        _module(name)
        for name in (
            "opentelemetry.sdk.trace",
            "opentelemetry.sdk.trace.export",
            "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        )
    )
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    made: TracerProvider = provider
    return made


class Spans(Unwatched):
    """Makes a span of each request, from its submission to the end of its last answer.

    Attributes have the names of OpenTelemetry's conventions for generative AI where these have one (``gen_ai.``), else
    ``dynexport.``; events mark the start of the prompt and the first token. A refused request has no span.

    Args:
        model_name: the model's name.
        manifest: the manifest of its bundle.
        provider: makes the tracer; None for the process's own provider, which the application configures.

    Raises:
        DynexportError: without the package opentelemetry-api.
    """

    def __init__(self, model_name: str, manifest: Manifest, provider: TracerProvider | None = None) -> None:
        self._api = _module("opentelemetry.trace")
        self._tracer = self._api.get_tracer("dynexport", tracer_provider=provider)
        self._model, self._reader = model_name, DecisionReader(manifest)
        self._open: dict[Work, _Request] = {}

    def started(self, work: Work, waited: float) -> None:
        """Begin a span at the time of the submission."""
        span = self._request(work).span
        span.set_attribute("gen_ai.latency.time_in_queue", waited)
        span.set_attribute("dynexport.reused_tokens", work.reused)
        span.add_event("started")

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """Mark the first token of the first answer."""
        if first and not (request := self._request(answer.work)).answered:
            request.answered = True
            request.span.set_attribute("gen_ai.latency.time_to_first_token", gap)
            request.span.add_event("first token")

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Add an answer to its request's span, and end the span after the last one."""
        request = self._request(answer.work)
        request.answers -= 1
        request.reasons.append(reason)
        request.tokens += len(answer.tokens)
        request.decoded += max(0, len(answer.tokens) - 1)
        request.layers += self._layers(answer, decided)
        if request.answers:
            return
        del self._open[answer.work]
        span = request.span
        span.set_attribute("gen_ai.response.finish_reasons", request.reasons)
        span.set_attribute("gen_ai.usage.output_tokens", request.tokens)
        if request.decoded:
            span.set_attribute("dynexport.layers_per_token", request.layers / request.decoded)
        self._end(span, reason)

    def dropped(self, work: Work, reason: Reason) -> None:
        """Make the span of a request that ended in the queue."""
        self._end(self._span(work), reason)

    def _request(self, work: Work) -> _Request:
        """Return a request's open span; one that fails before it has started gets its span then."""
        if work not in self._open:
            self._open[work] = _Request(self._span(work), len(work.requests))
        return self._open[work]

    def _span(self, work: Work) -> Span:
        waited = time.monotonic() - work.arrived
        attributes = {
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": len(work.prompt),
            "dynexport.depth": work.depth.name,
            "dynexport.answers": len(work.requests),
        }
        span: Span = self._tracer.start_span(
            "request",
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=time.time_ns() - int(waited * 1e9),
        )
        return span

    def _end(self, span: Span, reason: Reason | str) -> None:
        if reason == "failed":
            span.set_status(self._api.StatusCode.ERROR)
        span.set_attribute("dynexport.end", reason)
        span.end()

    def _layers(self, answer: Answer, decided: Sequence[Decisions]) -> int:
        """Return the number of layers that an answer's generated tokens ran in, all together."""
        decoded = max(0, len(answer.tokens) - 1)
        if not decided:
            return decoded * len(answer.depth.keep)
        return int(self._reader.layers_run(self._reader.joined(decided[len(decided) - decoded :])).sum())


def _module(name: str) -> Any:
    return require_module(name, "otel", "report spans")


@dataclass
class _Request:
    """An open span and what is known of its answers.

    Attributes:
        span: the span.
        answers: number of answers that have not ended.
        answered: true after the first token.
        reasons: why its answers ended.
        tokens: number of generated tokens.
        decoded: number of these that ran.
        layers: number of layers that they ran in, all together.
    """

    span: Span
    answers: int
    answered: bool = False
    reasons: list[str] = field(default_factory=list)
    tokens: int = 0
    decoded: int = 0
    layers: int = 0


__all__ = ["Spans", "otlp_provider"]
