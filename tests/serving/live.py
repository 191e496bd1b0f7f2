"""Servers for tests: what a test sees of any, and the Python one in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import openai
from bundles import talking_checkpoint
from requests_of_tests import CHUNK

from dynexport.exporter import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.served import Directory, Served
from dynexport.runtime.serving.http.server import bind, make_server
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.worker import Worker

KEY = "a-key-for-tests"


def small_model(home: Path) -> Model:
    """The model "small" that servers of tests serve."""
    convert(talking_checkpoint(home / "model"), home / "small", speedups=[2.0], golden=False)
    return Model(Bundle.open(home / "small"), threads=1)


class AnyServer:
    """A running server of the model "small": what tests see of it.

    Attributes:
        model: the same model, to compare with.
        address: the server's, without a path.
    """

    model: Model
    address: str

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, **options)

    def post(self, path: str, **how: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | how.pop("headers", {})
        return httpx.post(self.address + path, headers=headers, timeout=30, **how)

    def rows_are_free(self) -> bool:
        """Wait until no request waits or runs; False if that does not happen."""
        raise NotImplementedError


# Starts a server with bounds, and fields of Settings by name.
Serve: TypeAlias = Callable[..., AbstractContextManager[AnyServer]]


class Live(AnyServer):
    """The Python server in a thread."""

    def __init__(self, model: Model, http: HttpSettings, **settings: Any) -> None:
        self.worker = Worker(model, Settings(chunk=CHUNK, **settings))
        self.model = model
        self.reported: list[str] = []
        self.app = create_app(Directory({"small": Served.of("small", self.worker)}), http, report=self.reported.append)
        self._socket = bind("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = make_server(self.app, http, [self.worker])
        self.thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def __enter__(self) -> Live:
        self.thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self.thread.join()

    def rows_are_free(self) -> bool:
        cache = self.worker.scheduler.cache
        for _ in range(400):
            if self.worker.scheduler.idle and len(cache.free) == cache.rows:
                return True
            time.sleep(0.01)
        return False
