"""The files of the web page, without a browser: headers, nothing from elsewhere, labels, contrast.

What it does is tested in a browser: tests/browser, `make test-page`.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from house import ROOT
from markup import Page

from dynexport.exporter.trace.colours import DARK, LIGHT, contrast
from dynexport.runtime.serving.http.app import create_app
from dynexport.runtime.serving.http.page import MEDIA_TYPES, PATHS, router
from dynexport.runtime.serving.http.served import Directory
from dynexport.runtime.serving.http.settings import HttpSettings

WEB = ROOT / "runtime" / "serving" / "http" / "web"
STYLE = (WEB / "page.css").read_text()
SCRIPTS = {path.name: path.read_text() for path in WEB.glob("*.js")}
NAMED = {"input", "select", "textarea"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.include_router(router)
    return TestClient(app)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page((WEB / "page.html").read_bytes())


@pytest.mark.parametrize("path", PATHS)
def test_files_are_served_with_a_strict_policy(client: TestClient, path: str) -> None:
    answer, file = client.get(path), WEB / PATHS[path]
    assert (answer.status_code, answer.content) == (200, file.read_bytes())
    assert answer.headers["content-type"] == MEDIA_TYPES[file.suffix]
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert "unsafe" not in str(policy) and policy["require-trusted-types-for"] == "'script'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers
    head = client.head(path)
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(answer.content)))


def test_every_file_is_served_and_no_other(client: TestClient) -> None:
    assert set(PATHS.values()) == {path.name for path in WEB.iterdir()}
    for path in ("/web/", "/web/page.py", "/web/../page.py", "/web/%2e%2e/page.py", "/web/page.html", "/web/page.js/"):
        assert client.get(path, follow_redirects=False).status_code in (307, 404), path
    assert client.post("/").status_code == 405
    assert client.get("/openapi.json").json()["paths"] == {}


def test_the_page_needs_no_key_where_the_api_does() -> None:
    client = TestClient(create_app(Directory({}), HttpSettings(keys=("secret",))))
    assert {client.get(path).status_code for path in PATHS} == {200}
    assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize("name", sorted(set(PATHS.values())))
def test_nothing_comes_from_elsewhere(name: str) -> None:
    content = (WEB / name).read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"""https?:|wss?:|@import|url\(|["'(]//|data:(?!")""", content)
    parts = re.findall(r"""(?:src|href)="([^"#]+)"|from "\./([^"]+)";""", content)
    assert all(f"/web/{part}" in PATHS for found in parts for part in (found[0].removeprefix("web/"), found[1]) if part)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_neither_make_markup_nor_keep_anything(name: str) -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "cookie",
                 "localStorage", "sessionStorage", "indexedDB", "console."):  # fmt: skip
        assert word not in SCRIPTS[name], word


def test_the_page_has_nothing_inline(page: Page) -> None:
    names = {name for _, attributes in page.tags for name in attributes}
    assert not [name for name in names if name == "style" or name.startswith("on")]
    assert not [tag for tag, attributes in page.tags if tag == "style" or (tag == "script" and "src" not in attributes)]
    assert not [tag for tag, attributes in page.tags if str(attributes.get("tabindex", "0")) != "0"]
    assert ("html", {"lang": "en"}) in page.tags


def test_every_field_has_a_label(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert set(ids.values()) == {1}
    labels = {attributes["for"] for tag, attributes in page.tags if tag == "label"}
    fields = {attributes["id"] for tag, attributes in page.tags if tag in NAMED}
    assert fields == labels != set()
    for name in ("aria-describedby", "aria-labelledby", "for"):
        assert {attributes[name] for _, attributes in page.tags if name in attributes} <= set(ids)
    # Scripts look for elements that exist.
    wanted = {name for script in SCRIPTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', script)}
    assert wanted and wanted <= set(ids)


def test_only_finished_answers_are_announced(page: Page) -> None:
    live = [attributes for _, attributes in page.tags if {"aria-live", "role"} & set(attributes)]
    assert [(a["id"], a["role"]) for a in live] == [("problem", "alert"), ("announcer", "status")]


def colours(theme: int) -> dict[str, str]:
    """The style's colours by name, for light (0) or dark (1) pages."""
    block = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)[theme]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    found = colours(theme)
    for text, backgrounds in {
        "ink": ("page", "panel", "d0", "d1", "d2", "d3", "d4", "d5"),
        "soft": ("page", "panel"),
        "accent": ("page", "panel"),
        "on-accent": ("accent",),
        "bad": ("page",),
    }.items():
        for background in backgrounds:
            assert contrast(found[text], found[background]) >= 4.5, (text, background)
    # What is no text: borders of fields, the ring of the focus, the mark of a token, tops of bars.
    for mark, background in (("edge", "page"), ("edge", "panel"), ("accent", "page"), ("accent", "panel")):
        assert contrast(found[mark], found[background]) >= 3, (mark, background)
    assert all(contrast(found["ink"], found[f"d{shade}"]) >= 3 for shade in range(6))


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_depths_have_the_colours_of_a_trace(theme: int) -> None:
    found, pictures = colours(theme), (LIGHT, DARK)[theme]
    assert [found[f"d{shade}"] for shade in range(6)] == list(pictures.depths)
    assert (found["page"], found["ink"], found["soft"]) == (pictures.page, pictures.ink, pictures.soft)


def test_colours_stand_in_the_themes_alone() -> None:
    rest = re.sub(r":root \{.*?\}", "", STYLE, flags=re.DOTALL)
    assert not re.findall(r":[^;{]*#[0-9a-f]{3,8}\b", rest)
    assert set(colours(0)) == set(colours(1)) == set(re.findall(r"var\(--([\w-]+)\)", rest))
