"""A server as its clients see it, by OpenAI's client and plain HTTP; tests/cpp runs this against the C++ service."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import openai
import pytest
from live import KEY, AnyServer, Serve
from requests_of_tests import CHUNK

from dynexport.runtime.serving.http.settings import HttpSettings


@pytest.fixture(scope="session")
def client(live: AnyServer) -> openai.OpenAI:
    return live.client()


def alone(live: AnyServer, prompt: str, tokens: int, **options: Any) -> str:
    return live.model.generate(prompt, max_new_tokens=tokens, chunk=CHUNK, **options).text


@pytest.mark.parametrize("name", ["small", "small@2", "small@full"])
def test_a_completion_is_what_the_model_generates_alone(live: AnyServer, client: openai.OpenAI, name: str) -> None:
    depth = name.partition("@")[2] or None
    found = client.completions.create(model=name, prompt="hello there", max_tokens=12, temperature=0)
    assert found.model == name
    assert found.choices[0].text == alone(live, "hello there", 12, depth=depth)
    assert found.usage is not None
    assert found.usage.completion_tokens <= 12
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = client.completions.create(
        model="small", prompt="hello there", max_tokens=12, temperature=0, extra_body={"depth": depth}
    )
    assert again.choices[0].text == found.choices[0].text
    with client.completions.create(
        model=name, prompt="hello there", max_tokens=12, temperature=0, stream=True
    ) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_a_chat(live: AnyServer, client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    expected = live.model.chat([*messages], max_new_tokens=10, chunk=CHUNK)
    found = client.chat.completions.create(model="small", messages=messages, max_completion_tokens=10, temperature=0)
    assert found.choices[0].message.content == expected.text
    assert found.choices[0].finish_reason == expected.finish_reason
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    again = client.chat.completions.create(model="small", messages=parts, max_tokens=10, temperature=0)
    assert again.choices[0].message.content == expected.text
    stream = client.chat.completions.create(
        model="small",
        messages=messages,
        max_tokens=10,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected.text
    assert chunks[-1].choices[0].finish_reason == expected.finish_reason
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.ids)
    layers = [layer for chunk in chunks for layer in (getattr(chunk.choices[0], "layers", None) or [])]
    assert len(layers) == len(expected.ids)


def test_several_prompts_and_answers_with_seeds(live: AnyServer, client: openai.OpenAI) -> None:
    how: Any = {"model": "small", "max_tokens": 6, "n": 2, "seed": 3, "temperature": 0.9}
    found = client.completions.create(prompt=["hello", "there is"], **how)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    again = client.completions.create(prompt=["hello", "there is"], **how)
    assert [choice.text for choice in again.choices] == [choice.text for choice in found.choices]
    assert len({choice.text for choice in found.choices}) > 1
    ids = live.model.text.encode("hello")
    by_ids = client.completions.create(prompt=[ids, ids], **how)
    assert [choice.text for choice in by_ids.choices] == [choice.text for choice in found.choices[:2]] * 2
    one = client.completions.create(prompt=ids, **how)
    assert [choice.text for choice in one.choices] == [choice.text for choice in found.choices[:2]]


def test_stop_strings_and_token_ids(live: AnyServer, client: openai.OpenAI) -> None:
    whole = alone(live, "hello there", 16)
    stop = whole[3:5]
    found = client.completions.create(model="small", prompt="hello there", max_tokens=16, temperature=0, stop=stop)
    assert found.choices[0].text == whole[: whole.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    ids = live.model.generate("hello there", max_new_tokens=16, chunk=CHUNK).ids
    by_id = client.completions.create(
        model="small", prompt="hello there", max_tokens=16, temperature=0, extra_body={"stop_token_ids": [ids[4]]}
    )
    assert by_id.choices[0].finish_reason == "stop"
    assert by_id.usage is not None
    assert by_id.usage.completion_tokens == ids.index(ids[4]) + 1


def test_log_probabilities(live: AnyServer, client: openai.OpenAI) -> None:
    found = client.completions.create(model="small", prompt="hello", max_tokens=4, temperature=0, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs and logprobs.top_logprobs and logprobs.tokens
    assert len(logprobs.tokens) == 4
    assert all(
        len(top) <= 3 and max(top.values()) == own
        for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )
    chat = client.chat.completions.create(
        model="small",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=3,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content
    assert all(one.logprob == one.top_logprobs[0].logprob and len(one.top_logprobs) == 2 for one in content)


def test_a_known_prefix_is_reported(client: openai.OpenAI) -> None:
    prompt = "a prompt that is known by its second time, as it is longer than a chunk"
    for expected in (False, True):
        found = client.completions.create(model="small", prompt=prompt, max_tokens=1, temperature=0)
        assert found.usage is not None and found.usage.prompt_tokens_details is not None
        assert bool(found.usage.prompt_tokens_details.cached_tokens) == expected


def test_models_and_tokens(live: AnyServer, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["small", "small@full", "small@2"]
    assert client.models.retrieve("small@2").id == "small@2"
    found = live.post("/tokenize", json={"model": "small", "prompt": "hello there"}).json()
    assert found["tokens"] == live.model.text.encode("hello there")
    text = live.post("/detokenize", json={"model": "small", "tokens": found["tokens"]}).json()["prompt"]
    assert "hello there" in text
    chat = live.post("/tokenize", json={"model": "small", "messages": [{"role": "user", "content": "hello"}]}).json()
    assert chat["tokens"] == live.model.text.chat([{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "nobody"}, 404, "model: expected one of small, found nobody"),
        ({"model": "small@9"}, 404, "depth: expected one of full, 2, found 9"),
        ({"depth": 9}, 400, "depth: expected one of full, 2, found 9"),
        ({"model": "small@2", "depth": 9}, 400, "depth: expected one of full, 2, found 9"),
        ({"model": "small@2", "depth": "full"}, 400, "depth: expected 2, as the model's name says, found full"),
        ({"banana": 1}, 400, "Unrecognized request argument supplied: banana"),
        ({"temperature": -1}, 400, "temperature: expected a number greater than or equal to 0, found -1"),
        ({"temperature": "hot"}, 400, "temperature: expected a valid number"),
        ({"max_tokens": 0}, 400, "max_tokens: expected a number greater than or equal to 1, found 0"),
        ({"max_tokens": 10**9}, 400, "prompt: expected at most"),
        ({"prompt": "hello " * 500}, 400, "prompt: expected at most"),
        ({"prompt": [999999]}, 400, "prompt: expected token ids"),
        ({"prompt": ""}, 400, "prompt: expected at least one token"),
        ({"n": 0}, 400, "n: expected a number greater than or equal to 1, found 0"),
        ({"n": 100}, 400, "n: expected at most 4 answers, found 100"),
        ({"best_of": 2}, 400, "best_of: expected 1, as n, found 2"),
        ({"echo": True}, 400, "echo: expected False, found True"),
        ({"logprobs": 50}, 400, "logprobs: expected a number less than or equal to 20, found 50"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias: expected token ids, found 'x'"),
        ({"logit_bias": {"999999": 1}}, 400, "logit_bias"),
        ({"model": "\ud800"}, 400, "body: expected text of whole characters, found half of a surrogate pair"),
        ({"prompt": "\ud800"}, 400, "body: expected text of whole characters, found half of a surrogate pair"),
        ({"depth": "\ud800"}, 400, "body: expected text of whole characters, found half of a surrogate pair"),
        ({"\ud800": 1}, 400, "body: expected text of whole characters, found half of a surrogate pair"),
        ({"stop": ["\ud800"]}, 400, "body: expected text of whole characters, found half of a surrogate pair"),
        ({"functions": []}, 400, "functions: not supported by this server; leave it out"),
        ({"prompt": ["hello", 3]}, 400, "prompt: expected "),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options: expected stream beside it"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_fields_are_refused_in_openais_form(
    live: AnyServer, fields: dict[str, Any], status: int, message: str
) -> None:
    body = json.dumps({"model": "small", "prompt": "hello"} | fields)
    found = live.post("/v1/completions", content=body.encode())
    assert (found.status_code, found.json()["error"]["message"][: len(message)]) == (status, message)
    assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert "\n" not in found.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "user"}]}, "messages[0]: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content: expected parts of",
        ),
        ({"top_logprobs": 2}, "top_logprobs: expected logprobs beside it"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens: expected 2, as max_completion_tokens, found 1"),
        ({"tool_choice": "required"}, "tool_choice: expected 'auto' or 'none'"),
        ({"audio": {}}, "audio: not supported by this server; leave it out"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_chats_are_refused(live: AnyServer, fields: dict[str, Any], message: str) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": "hello"}]} | fields
    found = live.post("/v1/chat/completions", json=body)
    assert (found.status_code, found.json()["error"]["message"][: len(message)]) == (400, message)


def test_the_client_raises_its_typed_errors(live: AnyServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="expected one of small, found nobody") as found:
        client.completions.create(model="nobody", prompt="hello")
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="together with the answer"):
        client.completions.create(model="small", prompt="hello", max_tokens=5000)
    with pytest.raises(openai.NotFoundError, match="language models only"):
        client.embeddings.create(model="small", input="hello")
    wrong = openai.OpenAI(base_url=f"{live.address}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
        wrong.models.list()


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{bad", 400, "body: expected JSON"),
        (b"", 400, "body: expected a JSON object"),
        (b"[1]", 400, "body: expected a JSON object"),
        (b'{"model": "small", "prompt": "\xff"}', 400, "body: expected JSON"),
        (b"[" * 5000, 400, "body: expected JSON"),
        (b'{"model": "small", "prompt": "' + b"a" * (1 << 17) + b'"}', 413, "body: expected at most 65536 bytes"),
    ],
    ids=["invalid", "empty", "a list", "not UTF-8", "deep", "too large"],
)
def test_bodies_that_are_no_requests(live: AnyServer, content: bytes, status: int, message: str) -> None:
    found = live.post("/v1/completions", content=content)
    assert (found.status_code, found.json()["error"]["message"][: len(message)]) == (status, message)


def raw(live: AnyServer, content: bytes, wait: float = 5) -> bytes:
    """Send bytes and return what comes back until the server closes the connection."""
    host, port = live.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(content)
        return drained(connection)


def drained(connection: socket.socket) -> bytes:
    """Return what comes until the server closes a connection."""
    found = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while part := connection.recv(1 << 16):
            found += part
    return found


def test_a_slow_writer_is_cut_off(live: AnyServer) -> None:
    begin = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n\r\n"
    found = raw(live, begin.encode() + b'{"model')
    assert b" 408 " in found
    assert b"expected all of it within 1 s" in found


def test_a_body_without_a_length_is_bounded_as_well(live: AnyServer) -> None:
    begin = (
        f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"4000\r\n" + b"a" * 0x4000 + b"\r\n"
    assert b" 413 " in raw(live, begin.encode() + 5 * chunk + b"0\r\n\r\n")
    assert b" 413 " in raw(live, begin.encode() + 40 * chunk)  # it does not read on to the end


def test_a_flood_of_headers_is_refused(live: AnyServer) -> None:
    found = raw(live, b"GET /health HTTP/1.1\r\n" + b"X-A: " + b"a" * (1 << 18))
    assert b" 400 " in found or b" 431 " in found or found == b""
    assert httpx.get(f"{live.address}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/v1/models/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/x"]
)
def test_paths_lead_nowhere(live: AnyServer, path: str) -> None:
    found = raw(
        live, f"GET {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n\r\n".encode()
    )
    assert b" 404 " in found
    assert b"root:" not in found


def test_keys_are_needed_for_models_and_not_for_health(live: AnyServer) -> None:
    assert httpx.get(f"{live.address}/v1/models").status_code == 401
    assert "didn't provide" in httpx.get(f"{live.address}/v1/models").json()["error"]["message"]
    assert httpx.post(f"{live.address}/tokenize", json={}).status_code == 401
    assert httpx.get(f"{live.address}/health").status_code == 200
    assert httpx.get(f"{live.address}/ready").json() == {"status": "ready"}
    assert live.client().models.list().data


def test_a_client_that_hangs_up_frees_its_rows(live: AnyServer, client: openai.OpenAI) -> None:
    with client.completions.create(model="small", prompt="hello", max_tokens=80, temperature=0, stream=True) as stream:
        next(iter(stream))
    assert live.rows_are_free()

    async def hang_up() -> None:
        async with httpx.AsyncClient() as http:
            body = {"model": "small", "prompt": "hello", "max_tokens": 80, "n": 2}
            headers = {"Authorization": f"Bearer {KEY}"}
            sending = asyncio.create_task(http.post(f"{live.address}/v1/completions", json=body, headers=headers))
            await asyncio.sleep(0.02)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    asyncio.run(hang_up())
    assert live.rows_are_free()


def test_a_slow_reader_holds_nobody_up(live: AnyServer, client: openai.OpenAI) -> None:
    """It holds its own connection only: the answer waits in memory, bounded by its number of tokens."""
    host, port = live.address.removeprefix("http://").split(":")
    body = json.dumps({"model": "small", "prompt": "hello", "max_tokens": 80, "stream": True}).encode()
    with socket.create_connection((host, int(port))) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        found = client.completions.create(model="small", prompt="there", max_tokens=5, temperature=0)
        assert found.choices[0].text == alone(live, "there", 5)
        assert live.rows_are_free()


def test_a_time_limit_is_told(serve: Serve) -> None:
    with serve(HttpSettings(request_seconds=0.0001), rows=1) as live:
        body = {"model": "small", "prompt": "hello", "max_tokens": 80}
        found = live.post("/v1/completions", json=body)
        assert (found.status_code, found.json()["error"]["type"]) == (408, "timeout_error")
        assert live.rows_are_free()


def test_a_client_that_does_not_read_is_cut_off(serve: Serve) -> None:
    with serve(HttpSettings(stall_seconds=0.2, header_seconds=0.2), rows=1) as live:
        begun = time.monotonic()
        assert raw(live, b"GET /health HTTP/1.1\r\nHost: a\r\nX-Slow: ", wait=30) == b""
        assert 0.15 < time.monotonic() - begun < 25, "closed by the server"
        big = {"model": "small", "prompt": ["hello"] * 100, "max_tokens": 80, "min_tokens": 80, "logprobs": 20}
        host, port = live.address.removeprefix("http://").split(":")
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect((host, int(port)))
            body = json.dumps(big | {"stream": True}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            assert live.rows_are_free()
            time.sleep(0.5)
            assert b"[DONE]" not in drained(slow)
        assert httpx.get(f"{live.address}/health").json() == {"status": "ok"}
