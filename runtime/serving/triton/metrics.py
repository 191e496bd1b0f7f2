"""Add a model's metrics to Triton's own, under the names of dynexport's HTTP server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.serving.metrics import COUNTERS
from dynexport.runtime.serving.watch import Unwatched
from dynexport.runtime.serving.work import Answer, Delivery, Reason, Work
from dynexport.runtime.serving.worker import Worker
from dynexport.runtime.serving.worker_metrics import GAUGES

_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
_SHARED = ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:prefix_cache_hits", "dynexport_requests_refused")
_ENDED = "vllm:request_success_total"
# In Triton a counter's name has its suffix.
_COUNTERS = {
    **{f"{name}_total": COUNTERS[name] for name in _SHARED},
    "dynexport_token_layers_total": "Layers that ran for generated tokens, summed over the tokens.",
    _ENDED: "Answers that ended, by finished_reason.",
}
METRICS = {**{name: GAUGES[name][0] for name in _GAUGES}, **_COUNTERS}


class Counts(Unwatched):
    """Counts what a scheduler does, in its thread."""

    def __init__(self) -> None:
        self._counted: Counter[tuple[str, str]] = Counter({(name, ""): 0 for name in _COUNTERS if name != _ENDED})

    def started(self, work: Work, waited: float) -> None:
        """Count the tokens of a prompt that were reused."""
        self._counted["vllm:prompt_tokens_total", ""] += work.reused
        self._counted["vllm:prefix_cache_hits_total", ""] += work.reused

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Count the tokens of a prompt that have run."""
        self._counted["vllm:prompt_tokens_total", ""] += prompt_tokens

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Count an answer by the reason of its end."""
        self._counted[_ENDED, str(reason)] += 1

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        """Count a generated token."""
        self._counted["vllm:generation_tokens_total", ""] += 1

    def delivered(self, delivery: Delivery) -> None:
        """Count the layers that ran for delivered tokens; called where they are sent."""
        self._counted["dynexport_token_layers_total", ""] += sum(one.layers for one in delivery.answered)

    def refused(self) -> None:
        """Count a request that found the queue full."""
        self._counted["dynexport_requests_refused_total", ""] += 1

    def counted(self) -> dict[tuple[str, str], int]:
        """Return the counts so far, by the metric's name and the reason of an end ("" for other metrics)."""
        return dict(self._counted.copy())


class TritonMetrics:
    """Publishes a model's numbers on Triton's metrics endpoint; calls come from one thread.

    Args:
        backend: the module ``triton_python_backend_utils``.
        model: the model's name, for the label ``model_name``.
        counts: the counts of the worker's scheduler.
        worker: the worker.
    """

    def __init__(self, backend: Any, model: str, counts: Counts, worker: Worker) -> None:
        self._counts, self._worker, self._labels = counts, worker, {"model_name": model}
        kinds = dict.fromkeys(_GAUGES, backend.MetricFamily.GAUGE)
        kinds |= dict.fromkeys(_COUNTERS, backend.MetricFamily.COUNTER)
        self._families = {
            name: backend.MetricFamily(name=name, description=text, kind=kinds[name]) for name, text in METRICS.items()
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._published: Counter[tuple[str, str]] = Counter()
        self.publish()

    def publish(self) -> None:
        """Publish all numbers as they are now."""
        for name in _GAUGES:
            _, value = GAUGES[name]
            self._metric((name, "")).set(float(value(self._worker)))
        for key, count in self._counts.counted().items():
            metric = self._metric(key)
            if more := count - self._published[key]:
                metric.increment(float(more))
                self._published[key] = count

    def _metric(self, key: tuple[str, str]) -> Any:
        """Return the metric of a name, and of a reason if it has one."""
        if key not in self._metrics:
            name, reason = key
            labels = {**self._labels, **({"finished_reason": reason} if reason else {})}
            self._metrics[key] = self._families[name].Metric(labels=labels)
        return self._metrics[key]


__all__ = ["METRICS", "Counts", "TritonMetrics"]
