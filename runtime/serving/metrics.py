"""Metrics for Prometheus, under vLLM's names where vLLM has the same ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dynexport.runtime.bundle.errors import require_module
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.serving.depth_counts import DepthCounts, golden_counts
from dynexport.runtime.serving.work import Answer, Reason, Work
from dynexport.runtime.serving.worker import Worker
from dynexport.runtime.serving.worker_metrics import Attached, families

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram
    from prometheus_client.core import Metric

# vLLM's bounds, in seconds, with smaller ones before them for small models.
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_GAP = (
    *(0.001, 0.0025, 0.005, 0.0075),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST = (
    *(0.01, 0.025, 0.05, 0.1, 0.2),
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_LATENCIES = {
    "time_to_first_token_seconds": ("From the submission to the first token.", _FIRST),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", _GAP),
    "e2e_request_latency_seconds": ("From the submission to the end of an answer.", _REQUEST),
    "request_queue_time_seconds": ("From the submission to the start of the prompt.", _REQUEST),
    "request_prefill_time_seconds": ("From the start of the prompt to the first token.", _REQUEST),
    "request_decode_time_seconds": ("From the first token to the end of an answer.", _REQUEST),
    "request_prompt_tokens": ("Tokens of a prompt.", _TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _TOKENS),
}
COUNTERS = {
    "vllm:prompt_tokens": "Tokens of prompts that have run or were reused.",
    "vllm:generation_tokens": "Generated tokens.",
    "vllm:prefix_cache_queries": "Tokens of prompts that have started.",
    "vllm:prefix_cache_hits": "Tokens of prompts whose entries came from earlier requests.",
    "vllm:spec_decode_num_draft_tokens": "Drafted tokens.",
    "vllm:spec_decode_num_accepted_tokens": "Drafted tokens that the full model chose.",
    "dynexport_requests_refused": "Requests that found the queue full.",
    "dynexport_scheduler_seconds": "Time of the scheduler's steps, the engine's included.",
}
# The reason of an answer's end, as vLLM calls it.
_FINISHED = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "timeout": "abort",
    "closed": "abort",
    "failed": "error",
}
_FAILURES: tuple[Reason, ...] = ("cancelled", "timeout", "failed", "closed")


class Metrics:
    """The metrics of all models of a server, in a registry of their own.

    Make a watch, give it to the worker, and attach the worker before it starts.

    Attributes:
        registry: the collectors.

    Raises:
        DynexportError: without the package prometheus_client.
    """

    def __init__(self) -> None:
        client: Any = require_module("prometheus_client", "serve", "report metrics")
        self._generate, self._content_type = client.generate_latest, client.CONTENT_TYPE_LATEST
        self.registry = client.CollectorRegistry()
        self.attached: dict[str, Attached] = {}
        kinds: dict[str, Any] = {"labelnames": ("model_name",), "registry": self.registry}
        self._histograms: dict[str, Histogram] = {
            name: client.Histogram(f"vllm:{name}", text, buckets=buckets, **kinds)
            for name, (text, buckets) in _LATENCIES.items()
        }
        self._counters: dict[str, Counter] = {
            name: client.Counter(name, text, **kinds) for name, text in COUNTERS.items()
        }
        for name, text, label in (
            ("vllm:request_success", "Answers that ended.", "finished_reason"),
            ("dynexport_request_failures", "Requests that ended without all their answers.", "reason"),
            ("dynexport_engine_seconds", "Time of the engine's calls.", "phase"),
        ):
            self._counters[name] = client.Counter(name, text, ("model_name", label), registry=self.registry)
        self.registry.register(self)

    def watch(self, model_name: str) -> ModelWatch:
        """Return a ``Watch`` that counts for a model; its name becomes the label ``model_name``."""
        return ModelWatch(self, model_name)

    def attach(self, model_name: str, worker: Worker) -> None:
        """Report a worker's queue, rows, cache and routers, in place of an earlier worker's.

        Raises:
            DynexportError: when the bundle's golden vectors cannot be read.
        """
        bundle = worker.model.bundle
        self.attached[model_name] = Attached(worker, DepthCounts(bundle.manifest), golden_counts(bundle))

    def expose(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text format, and its content type."""
        return self._generate(self.registry), self._content_type

    def describe(self) -> Iterable[Metric]:
        """Return the names of the metrics that ``collect`` makes, for the registry."""
        return families({})

    def collect(self) -> Iterable[Metric]:
        """Return the metrics that are read from workers, for the registry."""
        return families(self.attached)

    def counter(self, name: str, *labels: str) -> Counter:
        """Return one counter of a model; labels begin with the model's name."""
        return self._counters[name].labels(*labels)

    def histogram(self, name: str, model_name: str) -> Histogram:
        """Return one histogram of a model."""
        return self._histograms[name].labels(model_name)


class ModelWatch:
    """Counts what a scheduler does for one model.

    Args:
        metrics: the server's metrics.
        model_name: the model's name.
    """

    def __init__(self, metrics: Metrics, model_name: str) -> None:
        self._metrics, self._model = metrics, model_name
        bound = {name: metrics.histogram(name, model_name) for name in _LATENCIES}
        self._first, self._gap = bound["time_to_first_token_seconds"], bound["inter_token_latency_seconds"]
        self._whole, self._queue = bound["e2e_request_latency_seconds"], bound["request_queue_time_seconds"]
        self._prefill, self._decode = bound["request_prefill_time_seconds"], bound["request_decode_time_seconds"]
        self._prompt, self._answer = bound["request_prompt_tokens"], bound["request_generation_tokens"]
        counters = {name: metrics.counter(name, model_name) for name in COUNTERS}
        self._prompt_tokens, self._tokens = counters["vllm:prompt_tokens"], counters["vllm:generation_tokens"]
        self._queries, self._hits = counters["vllm:prefix_cache_queries"], counters["vllm:prefix_cache_hits"]
        self._drafted = counters["vllm:spec_decode_num_draft_tokens"]
        self._accepted = counters["vllm:spec_decode_num_accepted_tokens"]
        self._refused, self._steps = counters["dynexport_requests_refused"], counters["dynexport_scheduler_seconds"]
        self._engine = {
            phase: metrics.counter("dynexport_engine_seconds", model_name, phase) for phase in ("prompt", "decode")
        }
        self._ended = {
            reason: metrics.counter("vllm:request_success", model_name, finished)
            for reason, finished in _FINISHED.items()
        }
        self._failed = {
            reason: metrics.counter("dynexport_request_failures", model_name, reason) for reason in _FAILURES
        }
        self._running: dict[Work, _Running] = {}

    def started(self, work: Work, waited: float) -> None:
        """Count a prompt and its time in the queue."""
        self._running[work] = _Running.of(work)
        self._queue.observe(waited)
        self._prompt.observe(len(work.prompt))
        self._queries.inc(len(work.prompt))
        self._hits.inc(work.reused)
        self._prompt_tokens.inc(work.reused)

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Count the engine's time and a prompt's tokens."""
        self._engine["prompt" if prompt_tokens else "decode"].inc(seconds)
        if prompt_tokens:
            self._prompt_tokens.inc(prompt_tokens)

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """Count a token and the time before it."""
        self._tokens.inc()
        if first:
            self._first.observe(gap)
            running = self._running[answer.work]
            running.first = time.monotonic()
            self._prefill.observe(running.first - running.begun)
        else:
            self._gap.observe(gap)

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Count an answer, and where the tokens of its row ran."""
        work, now = answer.work, time.monotonic()
        self._ended[reason].inc()
        self._whole.observe(now - work.arrived)
        self._answer.observe(len(answer.tokens))
        self._drafted.inc(answer.acceptance.drafted)
        self._accepted.inc(answer.acceptance.accepted)
        running = self._running.setdefault(work, _Running.of(work))  # it may fail before it has started
        if answer.tokens:
            self._decode.observe(now - running.first)
        if (attached := self._metrics.attached.get(self._model)) is not None:
            _count_tokens(attached.counts, answer, decided, running)
        running.answers -= 1
        if not running.answers:
            del self._running[work]
            if reason in self._failed:
                self._failed[reason].inc()

    def dropped(self, work: Work, reason: Reason) -> None:
        """Count a request that ended in the queue."""
        self._failed[reason].inc()

    def refused(self) -> None:
        """Count a request that found the queue full."""
        self._refused.inc()

    def stepped(self, seconds: float) -> None:
        """Count the time of a step."""
        self._steps.inc(seconds)


@dataclass
class _Running:
    """The state of a running request, for its metrics.

    Attributes:
        begun: time.monotonic() at its start.
        answers: number of answers that have not ended.
        first: time.monotonic() of the latest first token.
        prompt: the decisions of the first call of the prompt that was counted; None if no prompt was.
        counted: true if a prompt without routers was counted.
    """

    begun: float
    answers: int
    first: float = 0.0
    prompt: Decisions | None = None
    counted: bool = False

    @classmethod
    def of(cls, work: Work) -> _Running:
        return cls(time.monotonic(), len(work.requests))


def _count_tokens(counts: DepthCounts, answer: Answer, decided: Sequence[Decisions], running: _Running) -> None:
    """Count the tokens of an answer's row; a prompt that several answers share counts once."""
    work = answer.work
    if not counts.routers:
        if not running.counted:
            counts.add_unrouted("prompt", answer.done - work.reused, len(answer.depth.prompt))
            running.counted = True
        counts.add_unrouted("decode", max(0, len(answer.tokens) - 1), len(answer.depth.keep))
        return
    calls = _calls_of_prompt(decided, len(work.prompt) - work.reused)
    if calls and running.prompt is not decided[0]:
        running.prompt = decided[0]
        counts.add("prompt", decided[:calls])
    counts.add("decode", decided[calls:])


def _calls_of_prompt(decided: Sequence[Decisions], tokens: int) -> int:
    """Return how many of a row's calls ran the prompt's tokens."""
    seen = 0
    for number, call in enumerate(decided):
        if seen >= tokens:
            return number
        seen += call.ran.shape[1]
    return len(decided)


__all__ = ["COUNTERS", "Metrics", "ModelWatch"]
