"""Hooks of mkdocs (mkdocs.yml) that build the documentation site; `make docs` runs it.

Pages outside docs/, such as README.md, are read in place. The reference has one page per public module, made from its
``__all__`` and docstrings. So every text has one source.
"""

from __future__ import annotations

import importlib
import posixpath
import re
from pathlib import Path
from typing import Any

from house import ROOT, link
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Modules whose ``__all__`` users may rely on.
PUBLIC = (
    "dynexport",
    "dynexport.runtime",
    "dynexport.exporter",
    "dynexport.exporter.checkpoint",
    "dynexport.exporter.profile",
)
# File in the repository -> page of the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "samples/cpp_service/README.md": "cpp-service.md",
    "samples/ray_serve/README.md": "ray-serve.md",
    "samples/training/README.md": "trained-models.md",
}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


@event_priority(100)  # before mkdocstrings reads its configuration
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link the package as one folder for the reference, and set GitHub's anchors for headings."""
    package = Path(config.site_dir).parent / "types"
    link(package)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package)]
    config.mdx_configs.setdefault("toc", {})["slugify"] = slug
    return config


def slug(heading: str, separator: str = "-") -> str:
    """Return the anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside docs/ and the reference."""
    texts = {page: (ROOT / path).read_text(encoding="utf-8") for path, page in ELSEWHERE.items()}
    texts |= {f"api/{module}.md": reference(module) for module in PUBLIC}
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Replace links between the repository's files by links between the site's pages."""
    here = page.file.src_uri
    source = next((path for path, name in ELSEWHERE.items() if name == here), f"docs/{here}")

    def led(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        target = ELSEWHERE.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return _LINK.sub(led, markdown)


def homes(module: str) -> dict[str, str]:
    """Return the full path of each public name of a module."""
    package = importlib.import_module(module)
    found = {}
    for name in (name for name in package.__all__ if not name.startswith("__")):
        value = getattr(package, name)
        found[name] = (
            f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else f"{module}.{name}"
        )
    return found


def reference(module: str) -> str:
    """Return the page of a public module: its docstring and its public names, each described on one page."""
    before = {home: page for page in reversed(PUBLIC[: PUBLIC.index(module)]) for home in homes(page).values()}
    parts = [f"# {module}", str(importlib.import_module(module).__doc__)]
    for name, home in homes(module).items():
        parts.append(f"`{name}`: see [{before[home]}]({before[home]}.md)." if home in before else f"::: {home}")
    return "\n\n".join(parts) + "\n"
