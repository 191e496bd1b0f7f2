"""The C++ service under the tests of the Python server that see only its outside: the same client, the same answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import CHAT, talking_checkpoint
from live import KEY, Serve, small_model
from requests_of_tests import CHUNK
from service import Service
from test_command import *  # noqa: F403 - these tests run here as well
from test_http import *  # noqa: F403
from test_metrics_server import *  # noqa: F403

from dynexport.exporter import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.settings import HttpSettings


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def serve(program: Sequence[str], model: Model, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    home, numbers = tmp_path_factory.mktemp("services"), itertools.count()

    def started(http: HttpSettings, **settings: Any) -> Service:
        return Service(program, model, http, home / f"{next(numbers)}.log", **settings)

    return started


@pytest.fixture(scope="session")
def live(serve: Serve) -> Iterator[Service]:
    http = HttpSettings(keys=("another", KEY), most_bytes=1 << 16, read_seconds=1)
    with serve(http, rows=4, prefix_bytes=1 << 20) as server:
        assert isinstance(server, Service)
        yield server


@pytest.fixture
def bundle(model: Model) -> Path:
    return model.bundle.path


def test_tools_and_variables_go_to_the_template(program: Sequence[str], tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}" + CHAT
    convert(talking_checkpoint(tmp_path / "model", template=template), tmp_path / "small", golden=False)
    model = Model(Bundle.open(tmp_path / "small"), threads=1)
    messages = [{"role": "user", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "zeta", "parameters": {"type": "object", "a": [1, 2.5]}}}]
    body = {"model": "small", "messages": messages, "max_tokens": 4, "temperature": 0}
    with Service(program, model, HttpSettings(), tmp_path / "log") as server:
        for more, variables in (
            ({"tools": tools}, {"tools": tools}),
            ({"tools": tools, "tool_choice": "none"}, {}),
            ({"chat_template_kwargs": {"mood": "kind"}}, {"mood": "kind"}),
        ):
            found = server.post("/v1/chat/completions", json={**body, **more}).json()
            expected = model.chat(messages, max_new_tokens=4, variables=variables, chunk=CHUNK)
            assert found["usage"]["prompt_tokens"] == len(model.text.chat(messages, variables=variables))
            assert found["choices"][0]["message"]["content"] == expected.text
