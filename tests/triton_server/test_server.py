"""Triton serves exported bundles: the texts of the model alone, errors, cancellation, metrics, unloading."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import CHUNK, MODELS, ROOT, SETTINGS, Stream, Triton
from tritonclient.grpc.model_config_pb2 import DataType
from tritonclient.utils import InferenceServerException

from dynexport.runtime.generation.model import Model, load
from dynexport.runtime.generation.request import Generation
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.triton.fields import INPUTS, OUTPUTS

PROMPT = "hello there, this is a prompt"
Alone = Callable[..., Generation]
# On a machine that is busy with other things, Triton may take longer than a test waits: it then runs once more.
pytestmark = pytest.mark.flaky(reruns=1)


@pytest.fixture(scope="session")
def alone(bundles: dict[str, Path]) -> Alone:
    """What the model generates by itself, without a server."""

    @cache
    def model(name: str) -> Model:
        return load(bundles[name], threads=1)

    return lambda name, prompt, **options: model(name).generate(prompt, chunk=CHUNK, **options)


def run(stream: Stream, responses: int) -> None:
    """Take some responses of a stream."""
    found = iter(stream)
    for _ in range(responses):
        next(found)


@pytest.mark.parametrize("model", MODELS)
def test_a_grpc_stream_is_what_the_model_generates_alone(triton: Triton, alone: Alone, model: str) -> None:
    expected = alone(model, PROMPT, max_new_tokens=20)
    found = triton.ask(model, text_input=PROMPT, max_tokens=20, temperature=0.0)
    assert (found.text, found.ids) == (expected.text, expected.ids)
    assert len(found.texts) > 1 and len(found.layers) == len(found.ids)
    assert found.last["finish_reason"].decode() == expected.finish_reason
    assert (found.last["prompt_tokens"], found.last["completion_tokens"]) == (len(PROMPT), len(found.ids))
    assert triton.ask(model, input_ids=[5, 6, 7], max_tokens=6, temperature=0.0).ids == (
        alone(model, [5, 6, 7], max_new_tokens=6).ids
    )


@pytest.mark.parametrize("model", MODELS)
def test_http_streams_the_same(triton: Triton, alone: Alone, model: str) -> None:
    expected = alone(model, PROMPT, max_new_tokens=12)
    given = {"text_input": PROMPT, "max_tokens": 12, "temperature": 0}
    events = triton.events(model, **given, stream=True)
    assert "".join(event["text_output"] for event in events) == expected.text
    assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + [expected.finish_reason]
    status, text = triton.post(f"models/{model}/generate", **given)
    assert status == 200 and json.loads(text)["text_output"] == expected.text
    assert json.loads(text)["output_ids"] == expected.ids


def test_many_requests_at_a_time_at_depths_of_their_own(triton: Triton, alone: Alone) -> None:
    asked = [(f"{'word ' * index}number {index}", ("full", "2")[index % 2], 8 + 3 * index) for index in range(8)]

    def ask(prompt: str, depth: str, tokens: int) -> Any:
        return triton.ask("skip", text_input=prompt, depth=depth, max_tokens=tokens, temperature=0.0)

    with ThreadPoolExecutor(int(SETTINGS["queue"])) as pool:  # more at a time may find the queue full
        found = list(pool.map(lambda one: ask(*one), asked))
    for (prompt, depth, tokens), answer in zip(asked, found, strict=True):
        assert answer.ids == alone("skip", prompt, depth=depth, max_new_tokens=tokens).ids
        assert set(answer.layers[1:]) <= {8 if depth == "full" else 4}


def test_stops_samplings_and_chats(triton: Triton, alone: Alone) -> None:
    whole = alone("skip", PROMPT, max_new_tokens=40).text
    stop = whole[10:12]
    found = triton.ask("skip", text_input=PROMPT, max_tokens=40, temperature=0.0, stop=["\x00", stop])
    assert found.text == whole[: whole.index(stop)] and found.last["finish_reason"] == b"stop"
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, seed=11, repetition_penalty=1.1)
    drawn = triton.ask(
        "skip",
        text_input=PROMPT,
        max_tokens=30,
        temperature=0.7,
        top_p=0.9,
        top_k=20,
        seed=11,
        repetition_penalty=1.1,
    )
    assert drawn.ids == alone("skip", PROMPT, max_new_tokens=30, sampling=sampling).ids
    messages = json.dumps([{"role": "user", "content": "hello"}])
    chat = "<|im_start|>user:hello<|im_end|><|im_start|>assistant:"
    found = triton.ask("skip", messages=messages, max_tokens=10, temperature=0.0)
    assert found.ids == alone("skip", chat, max_new_tokens=10, chat=True).ids


def test_a_prefix_is_known_the_second_time(triton: Triton, alone: Alone) -> None:
    prompt = "a prefix that no other test has, and that is long enough"
    answers = [triton.ask("skip", text_input=prompt, max_tokens=4, temperature=0.0) for _ in range(2)]
    assert answers[0].ids == answers[1].ids == alone("skip", prompt, max_new_tokens=4).ids
    assert answers[0].last["cached_tokens"] == 0 < answers[1].last["cached_tokens"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"text_input": "a", "depth": "7"}, "depth: expected one of full, 2, found 7"),
    "negative": ({"text_input": "a", "max_tokens": -1}, "max_tokens: expected at least 1, found -1"),
    "too long": ({"text_input": "a" * 4096, "max_tokens": 9}, "prompt: expected at most 4096 tokens together with the"),
    "no prompt": ({"max_tokens": 4}, "inputs: expected one of text_input, input_ids, messages, found none"),
    "two prompts": ({"text_input": "a", "messages": "[]"}, "found text_input and messages"),
    "temperature": ({"text_input": "a", "temperature": -1.0}, "temperature: expected a finite number >= 0, found -1.0"),
    "messages": ({"messages": "{"}, "messages: expected JSON, found something else"),
    "unknown id": ({"input_ids": [1, 999]}, "prompt: expected token ids 0..88, found 999"),
    "stop": ({"text_input": "a", "stop": [""]}, "stop: expected"),
    "schema": ({"text_input": "a", "json_schema": "[]"}, "json_schema: expected a JSON object, found list"),
}


@pytest.mark.parametrize("given, message", BAD.values(), ids=list(BAD))
def test_a_bad_request_is_told_what_is_wrong(triton: Triton, given: dict[str, Any], message: str) -> None:
    status, text = triton.post("models/skip/generate", **given)
    error = json.loads(text)["error"]
    assert status == 400 and error.startswith("INVALID_ARG: ") and message in error and "\n" not in error, (
        status,
        text,
    )
    with pytest.raises(InferenceServerException) as failed:
        triton.ask("skip", **given)
    assert message in str(failed.value)


def test_an_unknown_field_is_refused(triton: Triton) -> None:
    status, text = triton.post("models/skip/generate", text_input="a", max_token=3)
    assert status == 400 and "found max_token" in text


def test_grpc_tells_the_kind_of_an_error_on_request(triton: Triton) -> None:
    """By Triton's header; without it a stream's errors have a message only."""
    with pytest.raises(InferenceServerException) as failed:
        triton.ask("skip", headers={"triton_grpc_error": "true"}, text_input="a", depth="7")
    assert failed.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_time_limit_ends_a_request(triton: Triton) -> None:
    before = triton.metric("vllm:request_success_total", model_name="skip", finished_reason="timeout")
    with pytest.raises(InferenceServerException, match="the request reached its time limit"):
        triton.ask("skip", timeout=100_000, text_input="a", max_tokens=4000, temperature=1.0, seed=4)
    triton.until("vllm:request_success_total", before + 1, model_name="skip", finished_reason="timeout")


def test_a_cancelled_stream_frees_its_row(triton: Triton) -> None:
    stream = Stream(triton, "skip", text_input="a", max_tokens=4000, temperature=1.0, seed=1)
    run(stream, 3)
    triton.until("vllm:num_requests_running", 1, model_name="skip")
    before = triton.metric("vllm:request_success_total", model_name="skip", finished_reason="cancelled")
    stream.close(cancel=True)
    triton.until("vllm:request_success_total", before + 1, model_name="skip", finished_reason="cancelled")
    assert triton.metric("vllm:num_requests_running", model_name="skip") == 0


def test_a_client_that_hangs_up_frees_its_row(triton: Triton) -> None:
    before = triton.metric("vllm:request_success_total", model_name="skip", finished_reason="cancelled")
    connection = http.client.HTTPConnection("127.0.0.1", triton.port)
    body = json.dumps({"text_input": "a", "max_tokens": 4000, "temperature": 1, "seed": 2, "stream": True})
    connection.request("POST", "/v2/models/skip/generate_stream", body)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    answer.close()
    connection.close()
    triton.until("vllm:request_success_total", before + 1, model_name="skip", finished_reason="cancelled")
    triton.until("vllm:num_requests_running", 0, model_name="skip")


def test_a_full_queue_is_the_servers_fault(triton: Triton) -> None:
    given = {"text_input": "a", "max_tokens": 4000, "temperature": 1.0, "seed": 3}
    streams = [Stream(triton, "skip", **given) for _ in range(10)]
    try:
        triton.until("vllm:num_requests_running", 4, model_name="skip")
        triton.until("vllm:num_requests_waiting", 6, model_name="skip")
        status, text = triton.post("models/skip/generate", text_input="a")
        message = "UNAVAILABLE: queue: expected fewer than 6 waiting requests, found it full"
        assert (status, json.loads(text)) == (400, {"error": message})
        with pytest.raises(InferenceServerException) as failed:
            triton.ask("skip", headers={"triton_grpc_error": "true"}, text_input="a")
        assert failed.value.status() == "StatusCode.UNAVAILABLE"
    finally:
        for stream in streams:
            stream.close(cancel=True)
    triton.until("vllm:num_requests_running", 0, model_name="skip")
    triton.until("vllm:num_requests_waiting", 0, model_name="skip")


def test_the_config_is_read_as_it_is_written(triton: Triton) -> None:
    config = triton.client().get_model_config("skip").config
    assert config.backend == "python" and config.model_transaction_policy.decoupled and config.max_batch_size == 0
    for tensors, found in ((INPUTS, config.input), (OUTPUTS, config.output)):
        written = [(tensor.name, f"TYPE_{tensor.kind}", [-1 if tensor.several else 1]) for tensor in tensors]
        assert [(one.name, DataType.Name(one.data_type), list(one.dims)) for one in found] == written
    assert all(one.optional for one in config.input)
    assert {name: value.string_value for name, value in config.parameters.items()}.items() >= SETTINGS.items()


def test_metrics(triton: Triton) -> None:
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "dynexport_token_layers_total")

    def read() -> list[float]:
        return [triton.metric(name, model_name="mod") for name in names]

    before, served = read(), triton.metric("nv_inference_request_success", model="mod")
    answer = triton.ask("mod", text_input="abc", max_tokens=5, temperature=0.0)
    triton.until(names[1], before[1] + len(answer.ids), model_name="mod")
    assert [new - old for new, old in zip(read(), before, strict=True)] == [3, len(answer.ids), sum(answer.layers)]
    assert triton.metric("nv_inference_request_success", model="mod") == served + 1


def test_unloading_lets_requests_finish(triton: Triton, alone: Alone) -> None:
    stream = Stream(triton, "radial", text_input=PROMPT, max_tokens=30, temperature=0.0)
    found = iter(stream)
    ids = next(found).as_numpy("output_ids").tolist()
    unloading = threading.Thread(target=triton.post, args=("repository/models/radial/unload",))
    unloading.start()
    for response in found:
        ids += response.as_numpy("output_ids").tolist()
    unloading.join()
    stream.close()
    assert ids == alone("radial", PROMPT, max_new_tokens=30).ids
    deadline = time.monotonic() + 20
    while "UNLOADING" in (state := triton.post("repository/index")[1]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {model["name"]: model.get("state") for model in json.loads(state)}["radial"] == "UNAVAILABLE"
    assert triton.post("models/radial/generate", text_input="a")[0] == 404
    assert triton.post("repository/models/radial/load") == (200, "")
    assert triton.ask("radial", text_input="a", max_tokens=3, temperature=0.0).ids == (
        alone("radial", "a", max_new_tokens=3).ids
    )


def test_a_model_that_cannot_be_loaded_says_why_in_a_line(triton: Triton) -> None:
    status, text = triton.post("repository/models/broken/load")
    assert status == 400 and "threads: expected a whole number, found 'many'" in text
    assert triton.ask("mod", text_input="a", max_tokens=2, temperature=0.0).ids  # the others go on


@pytest.mark.parametrize("client, port", [("grpc_client", 1), ("http_client", 0)])
def test_the_sample_clients(triton: Triton, alone: Alone, client: str, port: int) -> None:
    address = f"{'http://' * (port == 0)}127.0.0.1:{triton.port + port}"

    def run_client(*options: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(ROOT / "samples" / "triton" / f"{client}.py"), "skip", PROMPT]
        return subprocess.run([*words, "--address", address, *options], capture_output=True, text=True, timeout=60)

    done = run_client("--depth", "2", "--max-tokens", "12")
    assert (done.returncode, done.stdout) == (0, alone("skip", PROMPT, depth=2, max_new_tokens=12).text + "\n")
    failed = run_client("--depth", "7")
    assert failed.returncode == 1 and "depth: expected one of full, 2, found 7" in failed.stderr
