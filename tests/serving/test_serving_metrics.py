"""Metrics: what is exposed is what was served, and golden vectors are the yardstick of drift."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, change_tensors, checkpoint, replace_file
from forms import FORMS, HOPS
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from requests_of_tests import CHUNK, Inbox, model_of, run, work
from safetensors.numpy import load_file
from test_scheduler import ROWS

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError
from dynexport.runtime.bundle.manifest import GOLDEN
from dynexport.runtime.execution.decisions import DecisionReader, Decisions
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.depth_counts import DepthCounts
from dynexport.runtime.serving.metrics import Metrics
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.watch import Unwatched, Watch
from dynexport.runtime.serving.watches import Watches
from dynexport.runtime.serving.work import Answer, Failure
from dynexport.runtime.serving.worker import QueueFull, Worker

NAME = "tiny"
METHODS = {name for name, _ in inspect.getmembers(Watch, inspect.isfunction) if not name.startswith("_")}


class Exposed:
    """The samples of an exposition, by name and labels."""

    def __init__(self, metrics: Metrics) -> None:
        content, self.content_type = metrics.expose()
        self.families: list[Metric] = list(text_string_to_metric_families(content.decode()))
        self.names = {sample.name for family in self.families for sample in family.samples}

    def all(self, name: str, **labels: str) -> dict[tuple[str, ...], float]:
        """Values by the labels that are not given; the model's name is."""
        labels = {"model_name": NAME, **labels}
        return {
            tuple(value for label, value in sample.labels.items() if label not in labels): sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.all(name, **labels)[()]


class Recorder(Unwatched):
    """Remembers what routers decided for generated tokens, [R, tokens] for each answer."""

    def __init__(self) -> None:
        self.decoded: list[np.ndarray] = []

    def ended(self, answer: Answer, reason: str, decided: Sequence[Decisions], overflow: int) -> None:
        if decided and len(answer.tokens) > 1:
            choices = np.concatenate([call.choices for call in decided], axis=1)
            self.decoded.append(choices[:, 1 - len(answer.tokens) :])


def served(model: Model, *others: Watch, **settings: Any) -> tuple[Metrics, Worker]:
    """A worker whose thread has not started: the test makes its steps."""
    metrics = Metrics()
    watch = Watches(metrics.watch(NAME), *others)
    worker = Worker(model, Settings(rows=ROWS, chunk=CHUNK, **settings), watch)
    metrics.attach(NAME, worker)
    return metrics, worker


def layers_of(inbox: Inbox) -> dict[int, list[int]]:
    """The layers that each answer's tokens were chosen from; the first one's ran in the prompt."""
    found: dict[int, list[int]] = {}
    for delivery in inbox.deliveries:
        for each in delivery.answered:
            found.setdefault(each.piece.row, []).append(each.layers)
    return found


@pytest.fixture(scope="module")
def golden_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """Models whose bundles have golden vectors."""
    pytest.importorskip("transformers")

    @cache
    def make(case: str) -> Model:
        path = tmp_path_factory.mktemp("golden") / case
        convert(CONFORMANCE / case, path, max_length=64, fields=HOPS if case.startswith("radial") else {})
        return Model(Bundle.open(path), threads=1)

    return make


@pytest.mark.parametrize("form", ["dense", "skip", "mod", "radial-step", "mod-topk", "early-exit-prompt-exit"])
def test_what_is_exposed_is_what_was_served(form: str, golden_model: Callable[[str], Model]) -> None:
    model = model_of(form) if form in FORMS else golden_model(form)
    recorder = Recorder()
    metrics, worker = served(model, recorder, prefix_bytes=1 << 20)
    scheduler = worker.scheduler
    rng = np.random.default_rng(3)
    begin = rng.integers(0, model.bundle.manifest.model.vocab_size, 9).tolist()
    depths = [None, *(depth.name for depth in model.bundle.manifest.depths)]
    inboxes, works = [Inbox() for _ in range(6)], []
    for index, inbox in enumerate(inboxes):
        prompt, depth = [*begin, *range(1, index + 2)], depths[index % len(depths)]
        works.append(work(model, prompt, 3 + index, inbox, n=1 + index % 2, depth=depth))
        scheduler.add(works[-1])
        scheduler.step()
    assert Exposed(metrics)("vllm:num_requests_running") == scheduler.running > 0
    assert Exposed(metrics)("vllm:num_requests_waiting") == scheduler.waiting > 0
    assert 0 < Exposed(metrics)("vllm:kv_cache_usage_perc") == scheduler.used < 1
    run(scheduler)

    found, answers = Exposed(metrics), sum(len(inbox.tokens) for inbox in inboxes)
    tokens = sum(len(ids) for inbox in inboxes for ids in inbox.tokens.values())
    hits, prompted = sum(each.reused for each in works), sum(len(each.prompt) for each in works)
    limits = model.executor.limits
    alone = limits.whole_prompts or limits.compete  # each answer runs its prompt
    ran = sum(len(each.prompt) * (len(each.requests) if alone else 1) for each in works) - hits
    assert found("vllm:generation_tokens_total") == found("vllm:request_generation_tokens_sum") == tokens
    assert found("vllm:time_to_first_token_seconds_count") == answers == 9
    assert found("vllm:inter_token_latency_seconds_count") == tokens - answers
    assert found("vllm:prefix_cache_hits_total") == hits and (hits > 0) == (scheduler.prefixes is not None)
    assert found("vllm:prefix_cache_queries_total") == found("vllm:request_prompt_tokens_sum") == prompted
    assert found("vllm:prompt_tokens_total") == ran + hits
    assert sum(found.all("vllm:request_success_total").values()) == answers
    assert found("vllm:request_queue_time_seconds_count") == len(works)
    engine = found("dynexport_engine_seconds_total", phase="prompt") + found(
        "dynexport_engine_seconds_total", phase="decode"
    )
    assert 0 < engine < found("dynexport_scheduler_seconds_total")

    assert found("dynexport_token_layers_count", phase="prompt") == ran
    assert found("dynexport_token_layers_count", phase="decode") == tokens - answers
    if form == "radial-step":  # a layer counts at every visit
        layers = model.bundle.manifest.model.layers
        visits = sum(((path >= 0) & (path < layers)).sum() for path in recorder.decoded)
        assert found("dynexport_token_layers_sum", phase="decode") == visits
    else:
        layers_run = sum(sum(layers[1:]) for inbox in inboxes for layers in layers_of(inbox).values())
        assert found("dynexport_token_layers_sum", phase="decode") == layers_run
    routed = found.all("dynexport_routed_tokens_total")
    assert routed == ({(): ran + tokens - answers} if model.executor.reader.rows else {})


def drift(found: Exposed, router: str) -> float:
    """The distance between a router's margins and those of the golden vectors, from the two histograms."""
    golden, margins = (found.all(f"dynexport_{kind}router_margin_bucket", router=router) for kind in ("golden_", ""))
    assert golden.keys() == margins.keys()
    return max(abs(golden[at] / golden[("+Inf",)] - margins[at] / margins[("+Inf",)]) for at in golden)


@pytest.mark.parametrize("case", ["mod-router", "radial-step"])
def test_the_golden_vectors_are_the_yardstick_of_drift(case: str, golden_model: Callable[[str], Model]) -> None:
    model = golden_model(case)
    tokens = golden_tokens(model.bundle)
    metrics, worker = served(model)
    worker.scheduler.add(work(model, tokens, 1, Inbox()))  # the one new token does not run
    run(worker.scheduler)
    same = Exposed(metrics)
    shares = same.all("dynexport_golden_layer_run_ratio")
    runs = same.all("dynexport_layer_runs_total")
    assert {layer: count / len(tokens) for layer, count in runs.items()} == pytest.approx(shares)
    routers = [str(router) for router in metrics.attached[NAME].counts.routers]
    assert len(routers) == model.executor.reader.rows
    assert [drift(same, router) for router in routers] == [pytest.approx(0, abs=0.03)] * len(routers)
    worker.scheduler.add(work(model, tokens[:1] * 60, 1, Inbox()))
    run(worker.scheduler)
    other = Exposed(metrics)
    assert max(drift(other, router) for router in routers) > 0.1
    drifts = other.all("dynexport_router_drift")
    assert drifts == {(router,): pytest.approx(drift(other, router), abs=0.01) for router in routers}


def test_a_router_that_drifted_is_seen(golden_model: Callable[[str], Model], tmp_path: Path) -> None:
    """The second of two routers got another bias; the golden vectors are from before."""
    bundle = golden_model("mod-router").bundle
    model_path = checkpoint(tmp_path / "model", "mod-router")
    change_tensors(model_path, lambda tensors: tensors["model.layers.3.mod_router.bias"].__iadd__(3))
    convert(model_path, tmp_path / "bundle", max_length=64, golden=False)
    golden = bundle.file(GOLDEN)
    assert golden is not None
    replace_file(tmp_path / "bundle", GOLDEN, golden.read_bytes())
    model = Model(Bundle.open(tmp_path / "bundle"), threads=1)
    metrics, worker = served(model)
    assert Exposed(metrics).all("dynexport_router_drift") == {}, "nothing has been served"
    worker.scheduler.add(work(model, golden_tokens(bundle), 1, Inbox()))
    run(worker.scheduler)
    drifts = Exposed(metrics).all("dynexport_router_drift")
    assert drifts["1",] == pytest.approx(0, abs=0.03) and drifts["3",] > 0.3, drifts


def test_old_margins_fade_from_the_drift() -> None:
    manifest = model_of("mod").bundle.manifest
    reader, active = DecisionReader(manifest), np.ones(manifest.model.layers, bool)

    def counted(*tokens_of_margins: tuple[int, float]) -> DepthCounts:
        counts = DepthCounts(manifest)
        for tokens, margin in tokens_of_margins:
            margins = np.full((2, tokens), margin, np.float32)
            counts.add("prompt", [reader.of_row(np.ones((2, tokens)), margins, margins, np.zeros(2), active)])
        return counts

    wide, near = (counted((1, margin)).read() for margin in (5.0, 0.001))
    counts = counted((20_000, 5.0), (10_000, 0.001))
    faded = 20_000 / 2
    assert counts.drift(wide).tolist() == [pytest.approx(10_000 / (10_000 + faded))] * 2
    assert counts.drift(near).tolist() == [pytest.approx(faded / (10_000 + faded))] * 2


def golden_tokens(bundle: Bundle) -> list[int]:
    path = bundle.file(GOLDEN)
    assert path is not None
    tensors = load_file(path)
    return max((tensors[name] for name in ("tokens", "long_tokens") if name in tensors), key=len).tolist()


def fail(*arguments: object, **options: object) -> None:
    raise DynexportError("the engine failed")


def test_every_end_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    metrics, worker = served(model)
    scheduler, inboxes = worker.scheduler, [Inbox() for _ in range(7)]
    works = [work(model, [1, 2, 3], 9, inbox) for inbox in inboxes]
    for each in works[:6]:
        scheduler.add(each)
    scheduler.step()
    assert scheduler.running == ROWS and scheduler.waiting == 3
    works[0].cancelled = works[3].cancelled = True  # one that runs, one that waits
    works[1].deadline = works[4].deadline = time.monotonic() - 1
    scheduler.step()
    monkeypatch.setattr(model.executor, "decode", fail)
    monkeypatch.setattr(model.executor, "run", fail)
    scheduler.step()  # ends the two that run
    scheduler.add(works[6])
    scheduler.end_all(Failure("closed", "the server stops"))
    found = Exposed(metrics)
    failures = found.all("dynexport_request_failures_total")
    assert failures == {("cancelled",): 2, ("timeout",): 2, ("failed",): 2, ("closed",): 1}
    assert found.all("vllm:request_success_total") == {("stop",): 0, ("length",): 0, ("abort",): 2, ("error",): 2}
    assert found("vllm:num_requests_running") == found("vllm:num_requests_waiting") == 0


def test_a_full_queue() -> None:
    model = model_of("dense")
    metrics, worker = served(model, queue=2)  # its thread does not take them, as it has not started
    for _ in range(2):
        worker.submit(work(model, [1, 2, 3], 9, Inbox()))
    with pytest.raises(QueueFull):
        worker.submit(work(model, [1, 2, 3], 9, Inbox()))
    assert Exposed(metrics)("vllm:num_requests_waiting") == 2
    assert Exposed(metrics)("dynexport_requests_refused_total") == 1
    assert Exposed(metrics)("dynexport_ready") == 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_watches_forward_every_call(method: str) -> None:
    calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    class Notes(Unwatched):
        def __getattribute__(self, name: str) -> Any:
            return lambda *given, **more: calls.append((name, given, more))

    parameters = inspect.signature(getattr(Watch, method)).parameters.values()
    given = [object() for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD][1:]
    more = {each.name: object() for each in parameters if each.kind is each.KEYWORD_ONLY}
    getattr(Watches(Notes(), Notes()), method)(*given, **more)
    assert calls == [(method, tuple(given), more)] * 2
