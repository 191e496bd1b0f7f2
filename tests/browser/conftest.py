"""A headless browser for all tests of this folder, a server for each, and a page that reports every fault."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import browser
from fake_server import FakeServer, served
from playwright.sync_api import Browser, BrowserContext, Page


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
def page(context: BrowserContext, fake: FakeServer, address: str) -> Iterator[Page]:
    """The open page. No test may leave an error in its console, and nothing may be asked of another server."""
    faults: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
    opened.on("request", lambda sent: None if sent.url.startswith(address) else faults.append(sent.url))
    opened.goto(address)
    opened.locator("#model option").first.wait_for(state="attached")
    yield opened
    assert not faults
