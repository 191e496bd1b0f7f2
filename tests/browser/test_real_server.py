"""The web page of the real server, with two small trained models: its texts, layers and ends are the worker's."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from conftest import MOST_BYTES
from playwright.sync_api import Page, expect

from dynexport.runtime.serving.submit import answers, make_work
from dynexport.runtime.serving.worker import Worker

QUESTION = "JULIET. O Romeo, Romeo, wherefore art thou Romeo?"
# One model of each strategy.
NAMES = ("mod", "radial", "skip-2", "dense")
Real = tuple[str, dict[str, Worker]]


@pytest.fixture
def page(open_page: Callable[[str], Page], real: Real) -> Page:
    """The page, after its user has entered the API key; temperature 0 and 30 tokens."""
    opened = open_page(real[0])
    opened.get_by_label("API key").fill("secret")
    opened.keyboard.press("Enter")
    opened.get_by_text("Sampling").click()
    opened.get_by_label("Temperature").fill("0")
    opened.get_by_label("Most tokens").fill("30")
    return opened


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message").fill(question)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def answered(worker: Worker, *messages: str) -> tuple[str, list[int]]:
    """The text and the layers of the answer to a conversation, by the worker alone."""
    roles = ("user", "assistant")
    ids = worker.model.text.chat([{"role": roles[i % 2], "content": text} for i, text in enumerate(messages)])
    tokens = []
    for delivery in answers(worker, make_work(worker.model, ids, max_new_tokens=30, chat=True)):
        tokens += delivery.answered
    return "".join(token.piece.text for token in tokens), [token.layers for token in tokens]


@pytest.mark.parametrize("name", NAMES)
def test_texts_and_layers_are_those_of_the_worker(page: Page, real: Real, name: str) -> None:
    page.get_by_label("Model").select_option(name)
    page.get_by_label("Message").click()
    worker, said = real[1][name], []
    for question in (QUESTION, "And now?"):
        ask(page, question)
        said.append(question)
        text, layers = answered(worker, *said)
        said.append(text)
        assert page.locator(".answer .text").last.text_content() == text
        heights = (
            page.locator(".bars").last.locator("span").evaluate_all("all => all.map(b => parseFloat(b.style.height))")
        )
        assert [round(height * 12 / 100) for height in heights] == layers
        mean = f"{sum(layers) / 30:.1f}" if sum(layers) % 30 else sum(layers) // 30
        expect(page.locator(".summary").last).to_contain_text(f"30 tokens · mean depth {mean} of 12")
    assert (set(layers) == {12}) == (name == "dense")


def test_models_and_depths_are_offered(page: Page) -> None:
    assert page.locator("#model option").all_text_contents() == list(NAMES)
    for name in ("mod", "radial", "dense"):
        page.get_by_label("Model").select_option(name)
        expect(page.get_by_role("slider", name="Depth")).to_be_hidden()
        expect(page.locator("#model-note")).to_have_text("12 layers, one depth")
    page.get_by_label("Model").select_option("skip-2")
    expect(page.locator("#model-note")).to_have_text("12 layers, 2 depths")
    expect(page.locator("#depth-text")).to_have_text("ratio 2, up to 6 of 12 layers")
    page.get_by_role("slider", name="Depth").focus()
    page.keyboard.press("End")
    ask(page, QUESTION)
    expect(page.locator(".summary")).to_contain_text("mean depth 12 of 12 layers ·")


def test_stop_frees_the_row(page: Page, real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = real[1]["mod"].scheduler
    step = scheduler.step

    def slow() -> None:
        step()
        time.sleep(0.02)

    monkeypatch.setattr(scheduler, "step", slow)
    page.get_by_label("Most tokens").fill("400")
    page.get_by_label("Message").fill(QUESTION)
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text span").nth(3)).to_be_attached()
    assert not scheduler.idle
    page.keyboard.press("Escape")
    end = time.monotonic() + 2
    while not scheduler.idle and time.monotonic() < end:
        time.sleep(0.01)
    assert scheduler.idle and page.locator(".answer .text span").count() < 200


def test_what_the_server_refuses_is_said(page: Page) -> None:
    ask(page, "x" * MOST_BYTES)
    expect(page.get_by_role("alert")).to_contain_text("body: expected at most")
    ask(page, "word " * 2000)
    expect(page.get_by_role("alert")).to_contain_text("512")
    expect(page.get_by_label("Message")).to_have_value("word " * 2000)
    ask(page, QUESTION)
    expect(page.get_by_role("alert")).to_be_empty()
    expect(page.locator(".summary")).to_contain_text("30 tokens")
