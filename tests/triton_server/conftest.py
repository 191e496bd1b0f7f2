"""A real Triton server with bundles of three strategies; `make test-triton` runs this folder by itself."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import tritonclient.grpc as grpc

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from bundles import talking_checkpoint  # noqa: E402

from dynexport.exporter.bundle.conversion import convert  # noqa: E402
from dynexport.exporter.triton.repository import export  # noqa: E402
from dynexport.runtime.bundle.bundle import Bundle  # noqa: E402

CHUNK = 8
# Name -> checkpoint of the conformance set, and how it is converted.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "skip": ("skip-2x", {"speedups": [2.0], "max_length": 4096}),
    "mod": ("mod-router", {"fields": {"cache": {"capacity": 0.5}}}),
    "radial": ("radial-step", {"fields": {"max_steps": 3, "min_steps": 0}}),
}
SETTINGS = {"threads": "1", "chunk": str(CHUNK), "max_rows": "4", "queue": "6", "drain_seconds": "20"}
_TYPES = {
    bool: ("BOOL", np.bool_),
    float: ("FP32", np.float32),
    str: ("BYTES", np.object_),
}
Headers: TypeAlias = dict[str, str] | None


@dataclass
class Answer:
    """All responses to a request."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Triton:
    """A running server."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.port, self._log = free_ports(), log
        words = ["bash", ROOT / "samples" / "triton" / "serve.sh", sys.executable, str(self.port), repository]
        words += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in MODELS)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env={**os.environ})

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while not self._is_ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-4000:]
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/health/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def client(self) -> grpc.InferenceServerClient:
        return grpc.InferenceServerClient(f"127.0.0.1:{self.port + 1}")

    def ask(self, model: str, headers: Headers = None, timeout: int | None = None, **given: Any) -> Answer:
        """Stream an answer over gRPC; raises the error of a request that fails."""
        answer, stream = Answer(), Stream(self, model, headers, timeout, **given)
        try:
            for response in stream:
                answer.texts.append(response.as_numpy("text_output")[0].decode())
                answer.ids += response.as_numpy("output_ids").tolist()
                answer.layers += response.as_numpy("layers").tolist()
                names = ("finish_reason", "prompt_tokens", "completion_tokens", "cached_tokens")
                answer.last = {name: response.as_numpy(name)[0] for name in names}
        finally:
            stream.close()
        return answer

    def post(self, path: str, **given: Any) -> tuple[int, str]:
        """Return the status and the text of an HTTP answer."""
        body = json.dumps(given).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/v2/{path}", body, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def events(self, model: str, **given: Any) -> list[dict[str, Any]]:
        """Return the events of generate_stream."""
        status, text = self.post(f"models/{model}/generate_stream", **given)
        assert status == 200, text
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric; 0 if there is none."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + 2}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        found = [line for line in lines if re.match(rf"{name}{{", line) and all(part in line for part in wanted)]
        return float(found[0].rpartition(" ")[2]) if found else 0.0

    def until(self, name: str, value: float, **labels: str) -> None:
        """Wait for the value of a metric, for ten seconds at most."""
        deadline = time.monotonic() + 10
        while (found := self.metric(name, **labels)) != value:
            assert time.monotonic() < deadline, f"{name}: expected {value}, found {found}"
            time.sleep(0.02)


class Stream:
    """A gRPC stream with one request."""

    def __init__(
        self,
        server: Triton,
        model: str,
        headers: Headers = None,
        timeout: int | None = None,
        **given: Any,
    ) -> None:
        self._inbox: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self._client = server.client()
        self._client.start_stream(lambda result, error: self._inbox.put((result, error)), headers=headers)
        inputs = [tensor(name, value) for name, value in {"stream": True, **given}.items()]
        self._client.async_stream_infer(model, inputs, enable_empty_final_response=True, timeout=timeout)

    def __iter__(self) -> Iterator[Any]:
        while True:
            result, error = self._inbox.get(timeout=30)
            if error is not None:
                raise error
            response = result.get_response()
            if response.outputs:
                yield result
            if response.parameters["triton_final_response"].bool_param:
                return

    def close(self, *, cancel: bool = False) -> None:
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def tensor(name: str, value: Any) -> grpc.InferInput:
    """An input of the type that Triton expects."""
    values = value if isinstance(value, list) else [value]
    wide = name in ("input_ids", "stop_token_ids", "seed")
    kind, dtype = _TYPES.get(type(values[0]), ("INT64", np.int64) if wide else ("INT32", np.int32))
    array = np.array([each.encode() if isinstance(each, str) else each for each in values], dtype)
    made = grpc.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def free_ports() -> int:
    """The first of three adjacent free ports."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
        try:
            for other in (port, port + 1, port + 2):
                socket.create_server(("127.0.0.1", other)).close()
        except (OSError, OverflowError):
            continue
        return port


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("bundles")
    for name, (case, how) in MODELS.items():
        more = {"max_position_embeddings": how["max_length"]} if "max_length" in how else {}
        convert(talking_checkpoint(home / f"{name}-model", case, **more), home / name, golden=False, **how)
    return {name: home / name for name in MODELS}


@pytest.fixture(scope="session")
def triton(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    repository = tmp_path_factory.mktemp("models")
    for name, path in bundles.items():
        export(Bundle.open(path), repository, name, SETTINGS, link=name == "mod")
    export(Bundle.open(bundles["mod"]), repository, "broken", {**SETTINGS, "threads": "many"}, link=True)
    server = Triton(repository, repository.parent / "triton.log")
    try:
        server.wait()
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(timeout=40)
        finally:
            server.process.kill()
    assert server.process.returncode == 0
