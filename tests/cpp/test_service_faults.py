"""The C++ service under load, with clients that hang up or send nonsense, and with a model that fails."""

from __future__ import annotations

import json
import random
import socket
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bundles import change_tensors, talking_checkpoint
from live import KEY, Serve
from requests_of_tests import CHUNK
from service import Service
from test_http import drained, raw
from test_service import live, model, serve  # noqa: F401 - fixtures
from test_service_requests import mutated

from dynexport.exporter import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.settings import HttpSettings

LONG = {"model": "small", "prompt": "hello", "max_tokens": 80, "min_tokens": 80}
HEAD = f"Host: a\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"


def at_once(server: Service, count: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda _: server.post("/v1/completions", json=LONG), range(count)))


def test_a_full_queue_is_told_with_when_to_come_back(serve: Serve) -> None:  # noqa: F811
    with serve(HttpSettings(), rows=1, queue=1) as server:
        assert isinstance(server, Service)
        found = at_once(server, 24)
        assert {one.status_code for one in found} == {200, 429}
        for one in found:
            if one.status_code == 429:
                assert int(one.headers["retry-after"]) >= 1
                assert one.json()["error"]["code"] == "rate_limit_exceeded"
        refused = sum(one.status_code == 429 for one in found)
        assert server.measured("dynexport_requests_refused_total") == refused


def test_more_requests_than_the_server_takes_are_told(serve: Serve) -> None:  # noqa: F811
    with serve(HttpSettings(requests=1), rows=1) as server:
        assert isinstance(server, Service)
        found = at_once(server, 16)
        assert {one.status_code for one in found} == {200, 503}
        assert {one.headers["retry-after"] for one in found if one.status_code == 503} == {"1"}
        assert server.post("/v1/completions", json=LONG).status_code == 200


def test_a_model_that_fails_makes_the_server_unready(program: Sequence[str], tmp_path: Path) -> None:
    def broken(tensors: dict[str, np.ndarray]) -> None:
        """Finite weights, whose products are infinities of both signs."""
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], 1e38)
        name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
        tensors[name] = tensors[name] * 1e4

    checkpoint = talking_checkpoint(tmp_path / "model")
    change_tensors(checkpoint, broken)
    convert(checkpoint, tmp_path / "small", speedups=[2.0], golden=False)
    failing = Model(Bundle.open(tmp_path / "small"), threads=1)
    with Service(program, failing, HttpSettings(), tmp_path / "log") as server:
        assert httpx.get(f"{server.address}/ready").json() == {"status": "ready"}
        for _ in range(3):
            found = server.post("/v1/completions", json=LONG)
            assert (found.status_code, found.json()["error"]["code"]) == (500, "failed")
            assert "NaN" in found.json()["error"]["message"]
        ready = httpx.get(f"{server.address}/ready")
        assert ready.status_code == 503
        assert ready.json() == {"status": "not ready", "problems": {"small": "the last 3 requests failed"}}
        assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
        assert server.rows_are_free()
        assert server.measured("dynexport_ready") == 0


def test_a_body_that_nobody_read_is_not_the_next_request(live: Service) -> None:  # noqa: F811
    hidden = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    for head in (
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\n",  # no key
        "GET /health HTTP/1.1\r\nHost: a\r\n",
        "PUT /v1/completions HTTP/1.1\r\nHost: a\r\n",
        f"POST /nothing HTTP/1.1\r\n{HEAD}",
    ):
        found = raw(live, f"{head}Content-Length: {len(hidden)}\r\n\r\n".encode() + hidden)
        assert found.count(b"HTTP/1.1 ") == 1, found
        assert b"connection: close" in found.lower()


@pytest.mark.parametrize(
    "lengths",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 40\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 99999999999999999999\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
    ],
    ids=str.strip,
)
def test_a_body_of_unclear_length_is_refused(live: Service, lengths: str) -> None:  # noqa: F811
    found = raw(live, f"POST /tokenize HTTP/1.1\r\n{HEAD}{lengths}\r\n".encode() + b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    assert found.count(b"HTTP/1.1 ") == 1
    assert found.startswith(b"HTTP/1.1 400 ")


def test_a_client_that_asks_first_does_not_send_a_large_body(live: Service) -> None:  # noqa: F811
    found = raw(
        live, f"POST /tokenize HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\nContent-Length: 70000\r\n\r\n".encode()
    )
    assert found.startswith(b"HTTP/1.1 413 ")
    body = json.dumps({"model": "small", "prompt": "hello"}).encode()
    head = f"POST /tokenize HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\nConnection: close\r\nContent-Length: {len(body)}"
    found = raw(live, head.encode() + b"\r\n\r\n" + body)
    assert found.startswith(b"HTTP/1.1 100 ") and b"HTTP/1.1 200 " in found


def test_what_the_library_would_do_by_itself_is_off(live: Service) -> None:  # noqa: F811
    headers = {"Authorization": f"Bearer {KEY}"}
    plain = httpx.get(f"{live.address}/v1/models", headers=headers | {"Accept-Encoding": "identity"})
    ranged = httpx.get(f"{live.address}/v1/models", headers=headers | {"Range": "bytes=0-3", "Accept-Encoding": "gzip"})
    assert (ranged.status_code, ranged.content) == (200, plain.content)
    assert "content-encoding" not in ranged.headers
    for kind in ("multipart/form-data; boundary=a", "multipart/form-data", "application/x-www-form-urlencoded"):
        found = live.post("/tokenize", content=b"--a\r\n\r\nx\r\n--a--", headers={"Content-Type": kind})
        assert (found.status_code, found.json()["error"]["code"]) == (400, "invalid_json")
    packed = live.post("/tokenize", content=b"\x1f\x8b" + bytes(100), headers={"Content-Encoding": "gzip"})
    assert packed.status_code == 400
    assert httpx.put(f"{live.address}/v1/models", headers=headers).status_code == 405
    assert httpx.delete(f"{live.address}/v1/models", headers=headers).status_code == 405
    assert raw(live, b"NONSENSE\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    long = raw(live, f"GET /{'a' * 9000} HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n".encode())
    assert long.startswith(b"HTTP/1.1 414 ")


def test_a_form_that_needs_a_constraint_library_is_refused(live: Service) -> None:  # noqa: F811
    found = live.post("/v1/completions", json={**LONG, "response_format": {"type": "json_object"}})
    assert found.status_code == 400
    assert "this server has no constraint library" in found.json()["error"]["message"]


def test_connections_are_kept(live: Service) -> None:  # noqa: F811
    body = json.dumps({"model": "small", "prompt": "hello"}).encode()
    one = f"POST /tokenize HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}\r\n\r\n".encode() + body
    last = one.replace(b"Host: a\r\n", b"Host: a\r\nConnection: close\r\n")
    assert raw(live, one * 2 + last).count(b"HTTP/1.1 200 ") == 3


def test_mutated_bodies_harm_nobody(live: Service) -> None:  # noqa: F811
    generator = np.random.default_rng(5)
    paths = {
        "/v1/completions": {"model": "small@2", "prompt": ["hello", "a"], "max_tokens": 3, "logprobs": 2, "stop": "x"},
        "/v1/chat/completions": {"model": "small", "messages": [{"role": "user", "content": "é"}], "max_tokens": 3},
        "/tokenize": {"model": "small", "prompt": "hello", "add_special_tokens": True},
        "/detokenize": {"model": "small", "tokens": [1, 2, 3]},
    }
    bodies = [
        (
            path,
            mutated(
                generator, json.dumps(body | {"stream": True} if path[1] == "v" and number % 3 == 0 else body).encode()
            ),
        )
        for number in range(125)
        for path, body in paths.items()
    ]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda one: live.post(one[0], content=one[1]).status_code, bodies))
    assert set(found) <= {200, 400, 404} and found.count(400) > 250
    assert live.rows_are_free()


class Load:
    """Requests of every kind, and what came of them.

    Args:
        server: the service.
        texts: the texts of whole answers, by prompt and depth.
    """

    def __init__(self, server: Service, texts: dict[tuple[str, str], str]) -> None:
        self.server, self.texts, self.done = server, texts, 0

    def one(self, seed: int) -> None:
        draw = random.Random(seed)
        (prompt, depth), text = draw.choice(list(self.texts.items()))
        body: dict[str, Any] = {"model": f"small@{depth}", "prompt": prompt, "max_tokens": 40, "temperature": 0}
        match draw.randrange(7):
            case 0 | 1:
                found = self.server.post("/v1/completions", json=body)
                assert found.json()["choices"][0]["text"] == text
            case 2:
                assert "".join(self.events(body)) == text
            case 3:
                events = self.events(body)
                begun = "".join(part for part, _ in zip(events, range(draw.randrange(1, 9)), strict=False))
                assert text.startswith(begun)
                events.close()
            case 4:
                host, port = self.server.address.removeprefix("http://").split(":")
                content = json.dumps(body).encode()
                with socket.create_connection((host, int(port))) as connection:
                    head = f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: {len(content)}\r\n\r\n"
                    connection.sendall((head.encode() + content)[: draw.randrange(1, 400)])
            case 5:
                bad = draw.choice((b"{", b"[1]", b'{"model": "small"}', b'{"model": "small", "prompt": "a", "n": 0}'))
                assert self.server.post("/v1/completions", content=bad).status_code == 400
            case _:
                found = self.server.post("/v1/completions", json={**body, "prompt": prompt * 300})
                assert "prompt: expected at most" in found.json()["error"]["message"]
        self.done += 1

    def events(self, body: dict[str, Any]) -> Any:
        url, headers = f"{self.server.address}/v1/completions", {"Authorization": f"Bearer {KEY}"}
        with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=30) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line.removeprefix("data: "))["choices"][0]["text"]


def test_many_requests_with_hang_ups_and_nonsense(serve: Serve, model: Model) -> None:  # noqa: F811
    prompts = ("hello there", "a", "one prompt that is longer than a chunk", "one prompt that is longer still")
    texts = {
        (prompt, depth): model.generate(prompt, max_new_tokens=40, depth=depth, chunk=CHUNK).text
        for prompt in prompts
        for depth in ("2", "full")
    }
    with serve(HttpSettings(keys=(KEY,)), rows=4, prefix_bytes=1 << 20) as server, ThreadPoolExecutor(12) as pool:
        assert isinstance(server, Service)
        load = Load(server, texts)
        list(pool.map(load.one, range(200)))
        settled = server.resident
        list(pool.map(load.one, range(200, 600)))
        assert load.done == 600
        assert server.rows_are_free()
        assert server.resident < 1.1 * settled or server.has_sanitizer
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            assert b'{"status":"ok"}' in drained(connection)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--no-such-option"], "'--no-such-option': expected an option of --help"),
        (["--port"], "--port: expected a value, found none"),
        (["--port", "70000"], "--port: expected a whole number 0..65535, found '70000'"),
        (["--timeout", "nan"], "--timeout: expected seconds, 0 to 1000000, found 'nan'"),
        (["--backend", "abacus"], "abacus"),
        (["--onnxruntime", "missing.so"], "missing.so"),
        (["missing"], "missing"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_wrong_words_are_one_line(program: Sequence[str], model: Model, words: list[str], message: str) -> None:  # noqa: F811
    command = [*program, str(model.bundle.path), "--port", "0", *words]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    assert message in found.stderr


def test_help_lists_the_options_of_the_python_server(program: Sequence[str]) -> None:
    from dynexport.exporter.cli.serve import serve as command

    found = subprocess.run([program[0], "--help"], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0
    wanted = {name for option in command.params for name in option.opts if name.startswith("--")}
    assert {name for name in wanted if f"{name} " not in found.stdout} == {"--spans"}
    nothing = subprocess.run([program[0]], capture_output=True, text=True, timeout=60)
    assert (nothing.returncode, nothing.stdout) == (2, "")
