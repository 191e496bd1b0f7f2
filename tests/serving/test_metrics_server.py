"""/metrics of a real server: its numbers are what its clients saw. tests/cpp runs this with the C++ service."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import pytest
from bundles import environment, talking_checkpoint
from prometheus_client.parser import text_string_to_metric_families

from dynexport.exporter.bundle.conversion import convert

KEY = "a-key-for-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
SECRET = "zebra"  # in prompts


@pytest.fixture(scope="module")
def address(program: Sequence[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("metrics")
    for name, case in (("mod", "mod-router"), ("skip", "skip-2x")):
        convert(talking_checkpoint(home / f"{name}-model", case), home / name, golden=name == "mod")
    (home / "keys").write_text(KEY)
    how = ("--port", 0, "--threads", 1, "--api-key-file", home / "keys", "--chunk", 4)
    with subprocess.Popen(
        [*program, *map(str, (home / "mod", home / "skip", *how))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
        process.send_signal(signal.SIGTERM)
        assert "Traceback" not in process.communicate(timeout=30)[0]
    assert process.returncode == 0


def scraped(address: str) -> dict[tuple[str, ...], float]:
    """The sum of a metric's samples by name, model and, where it has one, phase."""
    answer = httpx.get(f"{address}/metrics")  # without a key, as Prometheus asks
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    assert SECRET not in answer.text and KEY not in answer.text
    found: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            at = (sample.name, *(sample.labels[name] for name in ("model_name", "phase") if name in sample.labels))
            found[at] = found.get(at, 0) + sample.value
    return found


def asked(address: str, **body: Any) -> Iterator[dict[str, Any]]:
    """The events of a streamed completion."""
    body = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, **body}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, headers=HEADERS, timeout=30) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


@pytest.mark.parametrize(("model", "depth"), [("mod", None), ("skip", None), ("skip", "full")])
def test_the_numbers_are_what_clients_saw(address: str, model: str, depth: str | None) -> None:
    before, started = scraped(address), time.monotonic()
    usages: list[dict[str, int]] = []
    layers: list[int] = []  # that each token but an answer's first ran in
    answers = 0
    for text, n in ((f"a {SECRET} here", 1), (f"a {SECRET} there", 2), ("hi", 1)):
        layers_of: dict[int, list[int]] = {}
        for event in asked(address, model=model, prompt=text, max_tokens=9, n=n, depth=depth):
            for choice in event["choices"]:
                layers_of.setdefault(choice["index"], []).extend(choice["layers"])
            usages += [event["usage"]] if event.get("usage") else []
        layers += [number for answer in layers_of.values() for number in answer[1:]]
        answers += len(layers_of)
    prompted, generated = (sum(usage[f"{what}_tokens"] for usage in usages) for what in ("prompt", "completion"))
    elapsed, after = time.monotonic() - started, scraped(address)

    def made(name: str, *phase: str) -> float:
        return after[name, model, *phase] - before[name, model, *phase]

    hits = made("vllm:prefix_cache_hits_total")
    assert made("vllm:prompt_tokens_total") == made("vllm:prefix_cache_queries_total") == prompted > hits > 0
    assert made("vllm:generation_tokens_total") == generated
    assert made("vllm:request_success_total") == made("vllm:time_to_first_token_seconds_count") == answers
    assert made("vllm:inter_token_latency_seconds_count") == generated - answers
    assert 0 < made("vllm:e2e_request_latency_seconds_sum") < answers * elapsed
    assert made("dynexport_token_layers_count", "prompt") == prompted - hits
    assert made("dynexport_token_layers_count", "decode") == len(layers) == generated - answers
    assert made("dynexport_token_layers_sum", "decode") == sum(layers) > 0
    others = [at for at in after if at[1] != model]
    assert others and [after[at] for at in others] == [before[at] for at in others]


def test_a_client_that_hangs_up_is_an_abort(address: str) -> None:
    before = after = scraped(address)
    failures, ends = ("dynexport_request_failures_total", "skip"), ("vllm:request_success_total", "skip")
    for hung_up in range(1, 50):  # a server that is fast, or a client that is slow, may be done before
        events = asked(address, model="skip", prompt=SECRET, max_tokens=200)
        next(events)
        events.close()
        for _ in range(200):
            if (after := scraped(address))[ends] == before[ends] + hung_up:
                break
            time.sleep(0.01)
        assert after[ends] == before[ends] + hung_up
        assert after["vllm:num_requests_running", "skip"] == after["vllm:kv_cache_usage_perc", "skip"] == 0
        if after[failures] > before[failures]:
            break
    assert after[failures] == before[failures] + 1
