"""A headless browser for all tests of this folder, a server for each, and a page that reports every fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from browser import browser
from docs_page import sample_app, sample_workers, served
from fake_server import FakeServer
from playwright.sync_api import Browser, BrowserContext, Page

from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.worker import Worker

MOST_BYTES = 20_000  # of a request to the real server


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="session")
def _fake() -> Iterator[tuple[FakeServer, str]]:
    server = FakeServer()
    with served(server.app) as address:
        yield server, address


@pytest.fixture
def fake(_fake: tuple[FakeServer, str]) -> FakeServer:
    """The fake server, as new."""
    server = _fake[0]
    app = server.app
    fresh = FakeServer()
    server.__dict__.update(fresh.__dict__)
    server.app = app
    return server


@pytest.fixture
def address(_fake: tuple[FakeServer, str]) -> str:
    """Where the fake server listens."""
    return _fake[1]


@pytest.fixture
def context(chromium: Browser) -> Iterator[BrowserContext]:
    """A browser's profile for one test, with a time limit that lets no test hang."""
    made = chromium.new_context(viewport={"width": 1100, "height": 800})
    made.set_default_timeout(5000)
    yield made
    made.close()


@pytest.fixture
def open_page(context: BrowserContext) -> Iterator[Callable[[str], Page]]:
    """Opens a server's page. No test may leave an error in its console, or ask anything of another server."""
    faults: list[str] = []

    def opened(address: str) -> Page:
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda sent: None if sent.url.startswith(address) else faults.append(sent.url))
        page.goto(address)
        return page

    yield opened
    assert not faults


@pytest.fixture
def page(open_page: Callable[[str], Page], fake: FakeServer, address: str) -> Page:
    """The page of the fake server."""
    page = open_page(address)
    page.locator("#model option").first.wait_for(state="attached")
    return page


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, Worker]]]:
    """The real server with a model of each strategy, which asks for the key "secret": its address and workers."""
    workers = sample_workers(("mod", "radial", "skip-2", "dense"), tmp_path_factory.mktemp("real"))
    with served(sample_app(workers, HttpSettings(keys=("secret",), most_bytes=MOST_BYTES))) as address:
        yield address, workers
