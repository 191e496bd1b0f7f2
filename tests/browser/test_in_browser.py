"""The web page in a real browser: answers, depths, keyboard, screen readers, hostile text, narrow screens."""

from __future__ import annotations

import re
import time

import pytest
from axe_playwright_python.sync_playwright import Axe
from fake_server import ANSWER, HOSTILE, MARKUP, REFUSALS, FakeServer
from playwright.sync_api import BrowserContext, Page, expect

TEXT = "".join(text for text, _ in ANSWER)


def ask(page: Page, question: str) -> None:
    """Send a message, and wait for the end of the answer."""
    page.get_by_label("Message").fill(question)
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()


def answer(page: Page) -> str:
    """The latest answer's text."""
    return page.locator(".answer .text").last.text_content() or ""


def axe(page: Page) -> None:
    """Check that axe-core finds no fault of accessibility."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": {"type": "tag", "values": tags}, "resultTypes": ["violations"]})
    assert found.violations_count == 0, found.generate_report()


def test_an_answer_with_its_depths(page: Page, fake: FakeServer) -> None:
    fake.pause = 0.04
    ask(page, "What is this?")
    assert answer(page) == TEXT
    shades = [page.locator(".answer .text span").nth(i).get_attribute("class") or "" for i in range(len(ANSWER))]
    assert [name.split()[0] for name in shades] == ["d5", "d2", "d2", "d1", "d2", "d5"]
    heights = page.locator(".bars span").evaluate_all("bars => bars.map(bar => bar.style.height)")
    assert heights == ["100%", "50%", "50%", "23.3333%", "50%", "100%"]
    summary = page.locator(".summary").text_content() or ""
    assert re.fullmatch(
        r"6 tokens · mean depth 18\.7 of 30 layers \(7 to 30\) · [\d.]+ tokens/s · first token after \d\.\d\d s"
        " · ended at the token limit",
        summary,
    )
    rate = float(re.search(r"([\d.]+) tokens/s", summary)[1])  # type: ignore[index]
    assert 5 < rate < 35
    assert float(re.search(r"after ([\d.]+) s", summary)[1]) >= 0.04  # type: ignore[index]
    assert fake.bodies[0] == {
        "model": "deep",
        "depth": "full",
        "max_tokens": 256,
        "messages": [{"role": "user", "content": "What is this?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_tokens_that_come_together_share_a_text(page: Page) -> None:
    ask(page, "together")
    assert answer(page) == "It is a"
    names = page.locator(".answer .text span").evaluate_all("all => all.map(one => one.className.split(' ')[0])")
    assert names == ["d5", "", "d2"]
    names = page.locator(".bars span").evaluate_all("all => all.map(one => one.className.split(' ')[0])")
    assert names == ["d5", "d1", "d2"]
    page.get_by_role("slider", name="Token").press("End")
    expect(page.locator(".readout")).to_have_text("3, “ a”: 15 of 30 layers")


def test_tokens_appear_as_they_come(page: Page, fake: FakeServer) -> None:
    page.get_by_label("Message").fill("endless")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text span").nth(3)).to_be_attached()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    assert page.locator("#announcer").text_content() == "Waiting for the answer."
    page.keyboard.press("Escape")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "false")
    assert fake.hung_up.wait(2)


def test_events_may_come_in_any_pieces(page: Page) -> None:
    ask(page, "in pieces")
    assert answer(page) == "Öl, ключ, 鍵"
    expect(page.locator(".summary")).to_contain_text("3 tokens")


def test_stop_keeps_the_text_so_far(page: Page, fake: FakeServer) -> None:
    page.get_by_label("Message").fill("endless")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text span").nth(3)).to_be_attached()
    page.get_by_role("button", name="Stop").click()
    assert fake.hung_up.wait(2)
    expect(page.locator(".summary")).to_contain_text("stopped")
    expect(page.get_by_label("Message")).to_be_focused()
    stopped = answer(page)
    time.sleep(0.05)
    assert answer(page) == stopped != ""
    ask(page, "And now?")
    roles = [(message["role"], message["content"]) for message in fake.bodies[1]["messages"]]
    assert roles == [("user", "endless"), ("assistant", stopped), ("user", "And now?")]


def test_a_new_conversation_forgets(page: Page, fake: FakeServer) -> None:
    ask(page, "one")
    ask(page, "two")
    assert [message["content"] for message in fake.bodies[1]["messages"]] == ["one", TEXT, "two"]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator("#conversation li").count() == 0
    ask(page, "three")
    assert fake.bodies[2]["messages"] == [{"role": "user", "content": "three"}]


def test_nothing_stays_in_the_browser(page: Page, context: BrowserContext) -> None:
    ask(page, "one")
    assert context.storage_state(indexed_db=True) == {"cookies": [], "origins": []}
    page.reload()
    assert page.locator("#conversation li").count() == 0


def test_a_new_conversation_ends_a_running_answer(page: Page, fake: FakeServer) -> None:
    page.get_by_label("Message").fill("endless")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text span").nth(3)).to_be_attached()
    page.get_by_role("button", name="New conversation").click()
    assert fake.hung_up.wait(2)
    expect(page.locator("#announcer")).to_have_text("New conversation.")
    ask(page, "next")
    assert answer(page) == TEXT and len(fake.bodies[1]["messages"]) == 1


def test_the_depth_is_chosen_with_the_keyboard(page: Page, fake: FakeServer) -> None:
    slider = page.get_by_role("slider", name="Depth")
    assert slider.get_attribute("aria-valuetext") == "full depth, up to 30 of 30 layers"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "depth keep, up to 20 of 30 layers"
    page.keyboard.press("Home")
    assert slider.get_attribute("aria-valuetext") == "ratio 2, up to 15 of 30 layers"
    expect(page.locator("#depth-text")).to_have_text("ratio 2, up to 15 of 30 layers")
    ask(page, "one")
    assert fake.bodies[0]["depth"] == "2"
    assert page.locator(".answer h3").text_content() == "deep, ratio 2"


def test_models_stand_once_with_the_depths_that_they_were_trained_for(page: Page, fake: FakeServer) -> None:
    assert page.locator("#model option").all_text_contents() == ["deep", "plain", MARKUP, "trained"]
    page.get_by_label("Model").select_option("trained")
    expect(page.locator("#depth-text")).to_have_text("ratio 2, up to 4 of 8 layers")
    assert page.get_by_role("slider", name="Depth").get_attribute("max") == "1"
    ask(page, "one")
    assert (fake.bodies[0]["model"], fake.bodies[0]["depth"]) == ("trained", "2")


def test_the_legend_names_the_layers_of_each_shade(page: Page) -> None:
    words = page.locator("#shades li").all_text_contents()
    assert words == [
        f"{first}\u2013{last}" for first, last in ((0, 5), (6, 10), (11, 15), (16, 20), (21, 25), (26, 30))
    ]
    names = page.locator("#shades .swatch").evaluate_all("all => all.map(one => one.className)")
    assert names == [f"swatch d{i}" for i in range(6)]


def test_a_model_without_depths(page: Page, fake: FakeServer) -> None:
    page.get_by_label("Model").select_option("plain")
    expect(page.locator("#depth-field")).to_be_hidden()
    expect(page.locator("#legend")).to_be_hidden()
    ask(page, "untold")
    assert answer(page) == TEXT
    assert "depth" not in fake.bodies[0] and fake.bodies[0]["model"] == "plain"
    assert "depth" not in (page.locator(".summary").text_content() or "")
    expect(page.locator("#model-note")).to_be_empty()
    expect(page.locator(".trace")).to_be_hidden()
    ask(page, "told")
    expect(page.locator(".chart").last).to_be_hidden()
    expect(page.locator(".readout").last).to_have_text("1, “It”: 30 layers")


def test_sampling_options(page: Page, fake: FakeServer) -> None:
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("0.7")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Most tokens").fill("")
    ask(page, "one")
    body = fake.bodies[0]
    assert (body["temperature"], body["top_p"], "max_tokens" in body) == (0.7, 0.9, False)
    page.get_by_label("Temperature").fill("9")
    page.get_by_text("Sampling").click()
    page.get_by_label("Message").fill("kept")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert page.get_by_label("Message").input_value() == "kept" and len(fake.bodies) == 1


def test_each_token_tells_its_layers_to_keyboard_and_pointer(page: Page) -> None:
    ask(page, "one")
    readout, slider = page.locator(".readout"), page.get_by_role("slider", name="Token")
    slider.focus()
    page.keyboard.press("End")
    expect(readout).to_have_text("6, “.”: 30 of 30 layers")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "4, “ dag”: 7 of 30 layers"
    expect(page.locator(".text .picked")).to_have_text("dag")
    page.locator(".answer .text span").nth(1).hover()
    expect(readout).to_have_text("2, “ is”: 15 of 30 layers")
    page.locator(".bars span").nth(4).hover()
    expect(readout).to_have_text("5, “ger”: 15 of 30 layers")
    assert slider.input_value() == "5"
    assert page.locator(".answer .text span").nth(3).get_attribute("title") == "7 of 30 layers"


def test_finished_answers_are_announced_once(page: Page) -> None:
    page.evaluate(
        """() => {
            window.heard = [];
            const region = document.querySelector("#announcer");
            new MutationObserver(() => heard.push(region.textContent)).observe(region, { childList: true });
        }"""
    )
    ask(page, "one")
    heard = page.evaluate("heard")
    assert heard[0] == "Waiting for the answer." and len(heard) == 2
    assert heard[1].startswith(f"{TEXT} 6 tokens, mean depth 18.7 of 30")
    assert page.locator("[aria-live], [role=alert], [role=log]").count() == 2
    assert page.locator(".answer [aria-live], .answer output").count() == 0


@pytest.mark.parametrize("question", ["hostile", HOSTILE])
def test_text_is_never_markup(page: Page, question: str) -> None:
    ask(page, question)
    assert page.locator(".message .text").first.text_content() == question
    assert page.locator("#conversation :is(img, script, b)").count() == 0
    assert page.title() == "dynexport"
    if question == "hostile":
        assert answer(page) == HOSTILE


def test_names_of_models_are_never_markup(page: Page) -> None:
    page.get_by_label("Model").select_option(MARKUP)
    ask(page, "one")
    assert page.locator(".answer h3").text_content() == MARKUP
    assert page.locator("body b").count() == 0


def test_the_policy_stops_markup_even_if_the_page_tried(page: Page) -> None:
    tried = "() => { try { document.body.innerHTML = '<b>x</b>'; } catch (error) { return error.name; } }"
    assert page.evaluate(tried) == "TypeError"


@pytest.mark.parametrize(
    ("question", "shown"),
    [
        ("full", "The queue is full. Try again in 7 s."),
        ("long", REFUSALS["long"][1]),
        ("draining", REFUSALS["draining"][1]),
        ("no json", "The server answered with status 502."),
    ],
)
def test_a_refusal_gives_the_message_back(page: Page, fake: FakeServer, question: str, shown: str) -> None:
    ask(page, question)
    expect(page.get_by_role("alert")).to_have_text(shown)
    expect(page.get_by_label("Message")).to_have_value(question)
    assert page.locator("#conversation li").count() == 0
    ask(page, "again")
    expect(page.get_by_role("alert")).to_be_empty()
    assert [message["content"] for message in fake.bodies[1]["messages"]] == ["again"]


@pytest.mark.parametrize(
    ("question", "shown"), [("breaks", "The engine failed."), ("hangs up", "The connection to the server was lost.")]
)
def test_a_stream_that_fails(page: Page, fake: FakeServer, question: str, shown: str) -> None:
    fake.pause = 0.05
    ask(page, question)
    expect(page.get_by_role("alert")).to_have_text(shown)
    assert answer(page) == "It is a"
    expect(page.locator(".summary")).to_contain_text("broken off")
    ask(page, "again")
    expect(page.get_by_role("alert")).to_be_empty()
    assert answer(page) == TEXT


def test_the_server_is_gone(page: Page, context: BrowserContext) -> None:
    context.set_offline(True)
    ask(page, "one")
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    context.set_offline(False)
    page.keyboard.press("Enter")
    expect(page.locator(".summary")).to_contain_text("6 tokens")


def test_the_list_of_models_can_be_asked_for_again(page: Page, context: BrowserContext) -> None:
    context.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.get_by_role("alert")).to_have_text("The server does not answer.")
    context.unroute("**/v1/models")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_label("Model")).to_have_value("deep")
    expect(page.get_by_role("alert")).to_be_empty()


def test_an_api_key(page: Page, fake: FakeServer, context: BrowserContext) -> None:
    assert page.get_by_label("API key").is_hidden()
    fake.key = "secret"
    page.reload()
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    expect(page.get_by_role("alert")).to_be_empty()
    axe(page)
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("Incorrect API key.")
    key.fill("secret")
    page.keyboard.press("Enter")
    expect(key).to_be_hidden()
    expect(page.get_by_label("Message")).to_be_focused()
    ask(page, "one")
    assert answer(page) == TEXT
    assert context.storage_state(indexed_db=True) == {"cookies": [], "origins": []}
    assert "secret" not in page.url and page.evaluate("sessionStorage.length") == 0


def test_a_key_that_is_withdrawn(page: Page, fake: FakeServer) -> None:
    fake.key = "other"
    ask(page, "one")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_label("Message")).to_have_value("one")


def test_lines_and_composition(page: Page, fake: FakeServer) -> None:
    field = page.get_by_label("Message")
    field.fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(field).to_have_value("one\ntwo")
    page.keyboard.press("Enter")
    expect(page.locator(".summary")).to_contain_text("6 tokens")
    assert fake.bodies[0]["messages"][0]["content"] == "one\ntwo"
    field.fill(" \n ")
    page.keyboard.press("Enter")
    assert len(fake.bodies) == 1


def test_the_order_of_the_focus(page: Page) -> None:
    ask(page, "one")
    page.locator(".skip").focus()
    seen = []
    for _ in range(7):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert seen == ["model", "depth", "SUMMARY", "new", "token-1", "message", "send"]


def test_the_keyboard_alone(page: Page, fake: FakeServer) -> None:
    for key in ("Tab", "Enter"):  # the link to the message
        page.keyboard.press(key)
    page.keyboard.type("one")
    for key in ("Tab", "Space"):  # the button that sends
        page.keyboard.press(key)
    expect(page.locator(".summary")).to_contain_text("6 tokens")
    expect(page.get_by_label("Message")).to_be_focused()
    for key in ("Shift+Tab", "End"):  # the answer's trace
        page.keyboard.press(key)
    expect(page.locator(".readout")).to_have_text("6, “.”: 30 of 30 layers")
    for key in ("Shift+Tab", "Space"):  # a new conversation
        page.keyboard.press(key)
    assert page.locator("#conversation li").count() == 0
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".summary")).to_contain_text("6 tokens")
    assert [len(body["messages"]) for body in fake.bodies] == [1, 1]


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 640})
    ask(page, "hostile")
    ask(page, "one")
    assert page.evaluate("document.scrollingElement.scrollWidth") == width
    low = "all => all.map(one => one.getBoundingClientRect()).filter(box => box.height && box.height < 24).length"
    assert page.locator("button, select, input, textarea, summary").evaluate_all(low) == 0


def test_a_long_answer_has_a_bar_for_every_token(page: Page) -> None:
    page.get_by_label("Message").fill("in length")
    page.keyboard.press("Enter")
    expect(page.locator(".summary")).to_contain_text("300 tokens", timeout=10_000)
    right = "all => all.at(-1).getBoundingClientRect().right"
    inside = page.locator(".bars").evaluate("bars => bars.getBoundingClientRect().right")
    assert page.locator(".bars span").count() == 300
    assert page.locator(".bars span").evaluate_all(right) <= inside + 0.5
    page.get_by_role("slider", name="Token").focus()
    page.keyboard.press("End")
    expect(page.locator(".readout")).to_have_text("300, “.”: 30 of 30 layers")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.get_by_text("Sampling").click()
    ask(page, "one")
    ask(page, "full")
    axe(page)


@pytest.mark.parametrize(("motion", "name"), [("reduce", "none"), ("no-preference", "blink")])
def test_motion_only_where_it_is_welcome(page: Page, motion: str, name: str) -> None:
    page.emulate_media(reduced_motion=motion)  # type: ignore[arg-type]
    page.get_by_label("Message").fill("endless")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text span").nth(1)).to_be_attached()
    moving = "getComputedStyle(document.querySelector('.answer .text'), '::after').animationName"
    assert page.evaluate(moving) == name
    page.keyboard.press("Escape")


def test_the_view_follows_the_answer_unless_the_reader_scrolls_up(page: Page) -> None:
    page.set_viewport_size({"width": 800, "height": 300})
    page.get_by_label("Message").fill("endless")
    page.keyboard.press("Enter")
    below = "() => { const p = document.scrollingElement; return p.scrollHeight - p.scrollTop - p.clientHeight; }"
    expect(page.locator(".answer .text span").nth(150)).to_be_attached()
    assert page.evaluate(below) < 60
    page.evaluate("document.scrollingElement.scrollTo(0, 0)")
    expect(page.locator(".answer .text span").nth(200)).to_be_attached()
    assert page.evaluate("document.scrollingElement.scrollTop") == 0
    page.keyboard.press("Escape")
