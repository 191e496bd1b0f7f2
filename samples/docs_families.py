"""Write the table of families in docs/families.md from the code: `python samples/docs_families.py`."""

from __future__ import annotations

from pathlib import Path

from dynexport.exporter.checkpoint.gguf_families import STORED_AS
from dynexport.exporter.families import families

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "families.md"
_BEGIN, _END = "<!-- begin: {} -->\n", "<!-- end -->\n"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns are padded to one width."""
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |\n"
        for line in lines
    )


def table() -> str:
    """Return the table of families, one per row."""
    rows = [
        [family.title, f"`{family.model_type}`", family.features, _gguf(family.model_type)]
        for family in sorted(families().values(), key=lambda family: family.title)
    ]
    return markdown(["Family", "`model_type`", "What sets it apart", "GGUF"], rows)


def _gguf(model_type: str) -> str:
    stored = STORED_AS.get(model_type)
    if stored is None:
        return "no"
    return "yes" if stored == model_type else f"yes, as `{stored}`"


def with_table(page: str, script: str, content: str) -> str:
    """Return the page with the table between the script's marks replaced."""
    before, rest = page.split(_BEGIN.format(script), 1)
    _, after = rest.split(_END, 1)
    return f"{before}{_BEGIN.format(script)}{content}{_END}{after}"


def page() -> str:
    """Return the text of docs/families.md with the table of the code."""
    return with_table(PAGE.read_text(), Path(__file__).name, table())


if __name__ == "__main__":
    PAGE.write_text(page())
