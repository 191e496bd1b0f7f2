"""The C++ service under the tests of the Python server that see only its outside: the same client, the same answers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from bundles import talking_checkpoint
from live import KEY, Serve
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
    home = tmp_path_factory.mktemp("served")
    convert(talking_checkpoint(home / "model"), home / "small", speedups=[2.0], golden=False)
    return Model(Bundle.open(home / "small"), threads=1)


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
