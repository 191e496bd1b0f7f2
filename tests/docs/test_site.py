"""The site: it builds without a warning, has every page and every public name, and asks nobody else for anything."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does: a warning fails."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    from house import ROOT
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    directory = tmp_path_factory.mktemp("docs") / "site"
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory), strict=True))
    return directory


def test_it_has_every_page(site: Path) -> None:
    from docs_site import ELSEWHERE, PUBLIC
    from house import ROOT

    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    pages |= {*ELSEWHERE.values(), *(f"api/{module}.md" for module in PUBLIC)}
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    assert built == {*pages, "404.md"}


def test_the_reference_has_every_public_name_once(site: Path) -> None:
    from docs_site import PUBLIC, homes

    told: set[str] = set()
    for module in PUBLIC:
        content = (site / "api" / f"{module}.html").read_text()
        assert set(homes(module)) == {name for name in importlib.import_module(module).__all__ if name[0] != "_"}
        headings = re.findall(r'<h2 id="([^"]+)"', content)
        assert headings == [home for home in homes(module).values() if home not in told]
        told |= set(headings)


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Links may lead out; what a browser loads by itself may not."""
    loads = re.compile(r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"')
    for page in site.rglob("*.html"):
        for found in loads.finditer(page.read_text()):
            assert not re.match(r"(\w+:)?//", found[1] or found[2]), f"{page.name}: {found[0]}"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[^;)]*//", sheet.read_text()), sheet


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "docs/chat.md#sampling", "chat.md#sampling"),
        ("index.md", "samples/training/README.md", "trained-models.md"),
        ("trained-models.md", "../../docs/routing-contract.md", "routing-contract.md"),
        ("tracing.md", "../samples/training/README.md", "trained-models.md"),
        ("tracing.md", "images/trace.png", "images/trace.png"),
        ("tracing.md", "https://example.org/docs/a.md", "https://example.org/docs/a.md"),
        ("tracing.md", "#here", "#here"),
    ],
)
def test_links_lead_to_the_pages_that_files_become(page: str, link: str, expected: str) -> None:
    from types import SimpleNamespace

    from docs_site import on_page_markdown

    where = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert on_page_markdown(f"[a]({link})", where) == f"[a]({expected})"
