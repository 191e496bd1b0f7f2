"""Draw the pictures of the web page: `python samples/docs_page.py` writes docs/images/page-*.png (samples/browser.py).

The page is served with two of the small trained models, whose checkpoints have no chat template: they get a plain one.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import uvicorn
from browser import browser
from fastapi import FastAPI
from playwright.sync_api import Page, ViewportSize, expect

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.served import Directory, Served
from dynexport.runtime.serving.http.settings import HttpSettings
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.worker import Worker

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
TRAINED = Path(__file__).resolve().parent / "training" / "checkpoints"
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
JULIET = "JULIET. O Romeo, Romeo, wherefore art thou Romeo?"
HAMLET = "HAMLET. To be, or not to be, that is the question:"


@dataclass(frozen=True)
class Picture:
    """The content of a picture.

    Attributes:
        model: the model that is asked.
        questions: the questions, each with a key that moves the depth slider before it, or "".
        tokens: tokens of an answer.
        width: pixels.
        height: pixels.
        scheme: colour scheme.
    """

    model: str
    questions: tuple[tuple[str, str], ...]
    tokens: int
    width: int
    height: int
    scheme: Literal["light", "dark"]


PICTURES = {
    "page-light": Picture("mod", ((JULIET, ""),), 38, 1100, 720, "light"),
    "page-dark": Picture("skip-2", ((HAMLET, "Home"), ("Who goes there?", "End")), 21, 1100, 940, "dark"),
    "page-phone": Picture("mod", ((JULIET, ""),), 38, 390, 844, "light"),
}


def bundle(name: str, directory: Path) -> Bundle:
    """Convert a trained checkpoint, with a plain chat template added, to a bundle in a directory."""
    checkpoint = directory / f"{name}-checkpoint"
    shutil.copytree(TRAINED / name, checkpoint)
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    convert(checkpoint, directory / name, golden=False)
    return Bundle.open(directory / name)


def sample_workers(names: tuple[str, ...], directory: Path) -> dict[str, Worker]:
    """Return workers for trained checkpoints, by name; their bundles are made in a directory."""
    return {name: Worker(Model(bundle(name, directory), threads=1), Settings(rows=2)) for name in names}


def sample_app(workers: Mapping[str, Worker], settings: HttpSettings) -> FastAPI:
    """Return the server's app for some workers."""
    return create_app(Directory({name: Served.of(name, worker) for name, worker in workers.items()}), settings)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an application on a free port of the loopback interface; yields its address."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def chat(page: Page, address: str, picture: Picture) -> None:
    """Ask the questions, wait for the end of the answers, and point at one of the last answer's tokens."""
    page.goto(address)
    page.get_by_label("Model").select_option(picture.model)
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Most tokens").fill(str(picture.tokens))
    page.get_by_text("Sampling").click()
    for number, (question, key) in enumerate(picture.questions, 1):
        if key:
            page.get_by_role("slider", name="Depth").press(key)
        page.get_by_label("Message").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator(".answer[aria-busy=false]")).to_have_count(number, timeout=60_000)
    page.get_by_role("slider", name="Token").last.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.evaluate("document.scrollingElement.scrollTo(0, 0)")


def main() -> None:
    """Write all pictures."""
    with tempfile.TemporaryDirectory() as home, browser() as chromium:
        app = sample_app(sample_workers(("mod", "skip-2"), Path(home)), HttpSettings())
        with served(app) as address:
            for name, picture in PICTURES.items():
                size: ViewportSize = {"width": picture.width, "height": picture.height}
                page = chromium.new_page(viewport=size, color_scheme=picture.scheme)
                chat(page, address, picture)
                page.screenshot(path=IMAGES / f"{name}.png")
                page.close()


if __name__ == "__main__":
    main()
