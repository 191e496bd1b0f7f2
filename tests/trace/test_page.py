"""The HTML page: it parses, needs nothing else, tells every cell, and shows texts as texts."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from markup import Page

from dynexport.exporter.trace import Trace, html
from dynexport.exporter.trace.colours import DARK, LIGHT, ROUTED_SKIPPED, SKIPPED

MakeTrace = Callable[..., Trace]


def test_hovering_tells_token_layer_score_and_margin(make_trace: MakeTrace) -> None:
    trace = make_trace(3, [1], 2, 3, [" a", " b"])
    page = Page(html.render(trace))
    titles = page.titles("td")
    assert len(titles) == 3 * 5
    assert titles[0] == "“ a”, token 0; layer 2: ran"
    ran = "ran" if trace.ran[1][1] else "did not run"
    score, margin = trace.scores[0][1], trace.margins[0][1]
    assert titles[5 + 1] == f"“ b”, token 1; layer 1: {ran}; score {score:.3g}, margin {margin:.3g}"
    assert page.titles("span")[4] == f"token 4: “ a”, id 4; ran in {trace.depth[4]} of 3 layers"
    classes = [str(attributes.get("class")) for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert [name.endswith(" first") for name in classes] == [False, False, True, False, False] * 3


def test_the_page_needs_nothing_else(make_trace: MakeTrace) -> None:
    page = Page(html.render(make_trace(3, [1], 2, 3)))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {
        "class", "title", "style", "lang", "charset", "name", "content", "scope", "colspan", "http-equiv",
    }  # fmt: skip
    assert "url(" not in page.text and "@import" not in page.text
    assert "default-src 'none'" in str(page.tags)


@pytest.mark.parametrize(
    "hostile", ["</span><script>alert(1)</script>", '" onmouseover="alert(1)', "{{ look }}", "&lt;"]
)
def test_texts_are_texts(make_trace: MakeTrace, hostile: str) -> None:
    page = Page(html.render(make_trace(2, [1], 1, 2, [hostile, "\x1b[31m\u202e"])))
    assert hostile in page.text
    assert any(hostile in title for title in page.titles("td"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "\\x1b[31m\\u202e" in page.text and "\x1b" not in page.text and "\u202e" not in page.text


def test_the_text_reads_as_text(make_trace: MakeTrace) -> None:
    assert "Once upon↵\n a" in Page(html.render(make_trace(1, [], 1, 4, ["Once", " upon", "\n", " a"]))).text
    assert ">0</span> <" in html.render(make_trace(1, [], 1, 1, [None])).decode()


@pytest.mark.parametrize(("prompt", "new"), [(1, 0), (0, 2), (3, 300)])
def test_any_number_of_tokens(make_trace: MakeTrace, prompt: int, new: int) -> None:
    page = Page(html.render(make_trace(3, [0, 2], prompt, new)))
    assert len(page.titles("td")) == 3 * (prompt + new)
    assert len(page.titles("tr")) >= 1


def test_a_number_that_is_none(make_trace: MakeTrace) -> None:
    trace = make_trace(1, [0], 1, 0).model_copy(update={"margins": ((None,),)})
    assert Page(html.render(trace)).titles("td")[0].endswith("margin none")


def test_a_path_has_its_steps_in_the_cells(path_trace: Trace) -> None:
    page = Page(html.render(path_trace))
    titles = [attributes["title"] or "" for tag, attributes in page.tags if tag == "td" and "title" in attributes]
    assert [title for title in titles if "layer 1:" in title][1].endswith("layer 1: ran in hop 1-3")
    assert "1-3" in page.text and "paths of 1.7 layers per token through a pool of 3" in page.text


def test_the_page_has_both_themes_and_clips_no_label(make_trace: MakeTrace) -> None:
    content = html.render(make_trace(3, [1], 2, 3, [" a" * 40])).decode()
    dark = content[content.index("prefers-color-scheme: dark") :]
    for theme, style in ((LIGHT, content), (DARK, dark)):
        for colour in (theme.page, theme.ink, theme.soft, *theme.depths, *theme.palette):
            assert colour in style
    # Colours stand in the themes alone, so that none stays light in the dark.
    assert not re.findall(r"#[0-9a-f]{3,6}\b", re.sub(r":root \{ --page.*?(?=\n\n|\n\})", "", content, flags=re.S))
    assert "overflow: hidden" not in content and "text-overflow" not in content and "overflow: clip" not in content


def test_cells_of_tokens_that_did_not_run_are_smaller(make_trace: MakeTrace) -> None:
    content = html.render(make_trace(3, [1], 2, 3)).decode()
    (rule,) = re.findall(r"^(.*) \{ background-clip: content-box; padding: 4px; \}", content, re.M)
    assert rule.split(", ") == [f".c{place}" for place in (SKIPPED, *ROUTED_SKIPPED)]
