"""Models and servers that the tests of this folder share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from bundles import command

from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.settings import HttpSettings

sys.path.append(str(Path(__file__).parent.parent / "execution"))

from live import KEY, Live, Serve, small_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return small_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def serve(model: Model) -> Serve:
    return partial(Live, model)


@pytest.fixture(scope="session")
def program() -> Sequence[str]:
    """The words that start a server, before its bundles and options."""
    return command("serve")


@pytest.fixture(scope="session")
def live(model: Model) -> Iterator[Live]:
    http = HttpSettings(keys=("another", KEY), most_bytes=1 << 16, read_seconds=1)
    with Live(model, http, rows=4, prefix_bytes=1 << 20) as server:
        yield server
