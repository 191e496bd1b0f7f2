"""``dynexport serve`` as a user starts, stops and kills it; tests/cpp runs this with the C++ service."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from live import KEY

from dynexport.runtime.generation.model import Model

SECRET = "a prompt that nobody but the model reads"


class Started:
    """A server in a process of its own; its two streams go to one file."""

    def __init__(self, program: Sequence[str], bundle: Path, log: Path, *options: str) -> None:
        self._log = log
        with log.open("w") as file:
            command = [*program, str(bundle), "--port", "0", *options]
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        while " at http" not in self.said:
            assert self.process.poll() is None, self.said
            time.sleep(0.02)
        self.address = self.said.split(" at ")[-1].strip()

    @property
    def said(self) -> str:
        return self._log.read_text()

    def streams(self, count: int) -> list[Iterator[Any]]:
        """Begin some streams and read their first events."""
        body = {
            "model": "small",
            "prompt": SECRET,
            "max_tokens": 80,
            "min_tokens": 80,
            "temperature": 0,
            "stream": True,
        }
        streams = [events(f"{self.address}/v1/completions", body) for _ in range(count)]
        for stream in streams:
            next(stream)
        return streams

    @property
    def received(self) -> int:
        """Requests that wait, run or have ended."""
        lines = httpx.get(f"{self.address}/metrics").text.splitlines()
        names = ("vllm:num_requests_waiting{", "vllm:num_requests_running{", "vllm:request_success_total{")
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith(names))

    def stop(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def events(url: str, body: dict[str, Any]) -> Iterator[Any]:
    with httpx.stream("POST", url, json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line:
                yield line.removeprefix("data: ")


@contextmanager
def started(program: Sequence[str], bundle: Path, log: Path, *options: str) -> Iterator[Started]:
    server = Started(program, bundle, log, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def bundle(model: Model) -> Path:
    return model.bundle.path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_running_requests_finish_when_the_server_is_told_to_stop(
    program: Sequence[str], bundle: Path, tmp_path: Path, number: int
) -> None:
    with started(program, bundle, tmp_path / "log", "--max-rows", "2") as server:
        streams = server.streams(2)  # and more wait than there are rows
        assert server.stop(number) == 0
        for stream in streams:
            *rest, last = stream
            assert last == "[DONE]"
            assert json.loads(rest[-1])["choices"][0]["finish_reason"] == "length"
        assert server.said.count("\n") == 1, "prompts, keys and requests are not logged"


def test_requests_that_do_not_finish_in_time_are_told(program: Sequence[str], bundle: Path, tmp_path: Path) -> None:
    body = {"model": "small", "prompt": SECRET, "max_tokens": 80, "min_tokens": 80}
    with started(program, bundle, tmp_path / "log", "--max-rows", "1", "--drain-seconds", "0") as server:
        with ThreadPoolExecutor(30) as pool:
            url = f"{server.address}/v1/completions"
            asked = [pool.submit(httpx.post, url, json=body, timeout=30) for _ in range(30)]
            # One that connects after the server stops listening is refused by the system, not told by the server.
            while server.received < 30:
                time.sleep(0.01)
            next(as_completed(asked))
            assert server.stop(signal.SIGTERM) == 0
        statuses = [one.result().status_code for one in asked]
        assert set(statuses) == {200, 503}
        told = asked[statuses.index(503)].result()
        assert told.json()["error"]["code"] == "server_unavailable"
        assert int(told.headers["retry-after"]) >= 1


def test_a_server_that_was_killed_starts_again_at_its_port(
    program: Sequence[str], bundle: Path, tmp_path: Path
) -> None:
    with started(program, bundle, tmp_path / "log") as server:
        (stream,) = server.streams(1)
        server.stop(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(stream)
        port = server.address.rpartition(":")[2]
        with started(program, bundle, tmp_path / "again", "--port", port) as again:
            assert httpx.get(f"{again.address}/ready").json() == {"status": "ready"}
            (stream,) = again.streams(1)
            assert list(stream)[-1] == "[DONE]"


def test_nothing_of_requests_is_logged(program: Sequence[str], bundle: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    with started(program, bundle, tmp_path / "log", "--api-key-file", str(keys)) as server:
        for body in (
            {"model": "small", "prompt": SECRET},
            {"model": SECRET},
            {"model": "small", "prompt": SECRET, "x": 1},
        ):
            for key in (KEY, "wrong-key"):
                httpx.post(f"{server.address}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
        assert server.stop(signal.SIGTERM) == 0
        assert server.said == f"serving small at {server.address}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "nowhere.invalid"], "--host nowhere.invalid --port 0: expected a free address, found: "),
        (["--name", "a", "--name", "b"], "--name: expected at most 1, one for each bundle, found 2"),
        (["--name", "a b"], "--name: expected letters, digits and . : / + - _, found 'a b'"),
        (["--api-key-file", "missing"], "missing: "),
        (["--max-rows", "0"], "rows: expected "),
        (["--chunk", "0"], "chunk: expected "),
        (["--prefix-cache", "much"], "expected a number of bytes such as 512M or 2G, found 'much'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_options_are_one_line(
    program: Sequence[str], bundle: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    command = [*program, str(bundle), "--port", "0", *options]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert found.returncode in (1, 2)
    assert message in found.stderr
    assert "Traceback" not in found.stderr
