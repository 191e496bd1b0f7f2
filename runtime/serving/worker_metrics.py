"""Metrics that are read from workers when Prometheus asks: queue, rows, cache, depth and routers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dynexport.runtime.bundle.errors import require_module
from dynexport.runtime.serving.depth_counts import PHASES, DepthCounts, Snapshot
from dynexport.runtime.serving.worker import Worker

if TYPE_CHECKING:
    from prometheus_client.core import HistogramMetricFamily, Metric

Array = np.ndarray


@dataclass
class Attached:
    """A model's worker and the counts of where its tokens ran.

    Attributes:
        worker: the worker.
        counts: counts of the tokens that it served.
        golden: the same counts of the bundle's golden vectors; None without routers or golden vectors.
    """

    worker: Worker
    counts: DepthCounts
    golden: DepthCounts | None


# Name -> (text, value of a worker).
GAUGES: dict[str, tuple[str, Callable[[Worker], float]]] = {
    "vllm:num_requests_waiting": ("Requests that wait for rows.", lambda worker: worker.waiting),
    "vllm:num_requests_running": ("Answers that hold rows.", lambda worker: worker.scheduler.running),
    "vllm:kv_cache_usage_perc": ("Share of the cache's tokens in use, 0 to 1.", lambda worker: worker.scheduler.used),
    "dynexport_rows": ("Most answers that run at a time.", lambda worker: worker.scheduler.rows),
    "dynexport_ready": ("1 if the worker takes requests, else 0.", lambda worker: not worker.problem),
    "dynexport_prefix_bytes": (
        "Memory of the entries of earlier prompts.",
        lambda worker: 0 if worker.scheduler.prefixes is None else worker.scheduler.prefixes.size,
    ),
}


def families(attached: Mapping[str, Attached]) -> Iterator[Metric]:
    """Yield the metric families of models' workers.

    Args:
        attached: the workers by model name; without any, the families are empty.

    Raises:
        DynexportError: without the package prometheus_client.
    """
    core: Any = require_module("prometheus_client.core", "serve", "report metrics")
    for name, (text, value) in GAUGES.items():
        gauge = core.GaugeMetricFamily(name, text, labels=["model_name"])
        for model, each in attached.items():
            gauge.add_metric([model], float(value(each.worker)))
        yield gauge
    served = {model: each.counts for model, each in attached.items()}
    golden = {model: each.golden.read() for model, each in attached.items() if each.golden is not None}
    yield from _of_tokens(core, served)
    yield from _of_golden(core, served, golden)


def _of_tokens(core: Any, served: Mapping[str, DepthCounts]) -> Iterator[Metric]:
    """Yield what was counted of served tokens."""
    depths = core.HistogramMetricFamily(
        "dynexport_token_layers", "Layers that a token ran in.", labels=["model_name", "phase"]
    )
    runs = core.CounterMetricFamily(
        "dynexport_layer_runs", "Tokens that ran in a layer that routers decide about.", labels=["model_name", "layer"]
    )
    tokens = core.CounterMetricFamily(
        "dynexport_routed_tokens", "Tokens that routers decided about.", labels=["model_name"]
    )
    overflow = core.CounterMetricFamily(
        "dynexport_overflow_tokens", "Tokens that found a layer or its cache full.", labels=["model_name"]
    )
    margins = _margins(core, "dynexport_router_margin", "Margins of routers' decisions.")
    for model, counts in served.items():
        found = counts.read()
        for phase, tokens_at, layers in zip(PHASES, found.depths, found.summed, strict=True):
            depths.add_metric([model, phase], _buckets(counts.depth_bounds.tolist(), tokens_at), float(layers))
        if counts.routers:
            for layer, count in zip(counts.layers, found.runs, strict=True):
                runs.add_metric([model, str(layer)], float(count))
            tokens.add_metric([model], float(found.depths.sum()))
            overflow.add_metric([model], float(found.overflow))
            _add_margins(margins, model, counts, found.margins)
    yield from (depths, runs, tokens, overflow, margins)


def _of_golden(core: Any, served: Mapping[str, DepthCounts], golden: Mapping[str, Snapshot]) -> Iterator[Metric]:
    """Yield what was counted of golden vectors, and how far the served tokens are from it."""
    shares = core.GaugeMetricFamily(
        "dynexport_golden_layer_run_ratio",
        "Share of the golden vectors' tokens that ran in a layer.",
        labels=["model_name", "layer"],
    )
    margins = _margins(core, "dynexport_golden_router_margin", "Margins of decisions in the golden vectors.")
    drift = core.GaugeMetricFamily(
        "dynexport_router_drift",
        "Distance of the latest margins' distribution from the golden vectors', 0 to 1.",
        labels=["model_name", "router"],
    )
    for model, found in golden.items():
        counts = served[model]
        for router, distance in zip(counts.routers, counts.drift(found), strict=True):
            if not np.isnan(distance):  # there are margins
                drift.add_metric([model, router], float(distance))
        for layer, count in zip(counts.layers, found.runs, strict=True):
            shares.add_metric([model, str(layer)], float(count) / float(found.depths.sum()))
        _add_margins(margins, model, counts, found.margins)
    yield from (shares, margins, drift)


def _margins(core: Any, name: str, text: str) -> HistogramMetricFamily:
    found: HistogramMetricFamily = core.HistogramMetricFamily(name, text, labels=["model_name", "router"])
    return found


def _add_margins(family: HistogramMetricFamily, model: str, counts: DepthCounts, margins: Array) -> None:
    for router, found in zip(counts.routers, margins, strict=True):
        family.add_metric([model, router], _buckets(counts.margin_bounds, found), None)


def _buckets(bounds: Sequence[float], counts: Array) -> list[tuple[str, float]]:
    """Return a histogram's cumulative buckets; the last one, +Inf, has all."""
    names = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return list(zip(names, np.cumsum(counts).astype(float).tolist(), strict=True))


__all__ = ["GAUGES", "Attached", "families"]
