"""Write the tables of config fields in docs/config-fields.md from the code: `python samples/docs_fields.py`."""

from __future__ import annotations

import json
from pathlib import Path

from docs_families import DOCS, markdown, with_table

from dynexport.exporter.families import asked_fields, families
from dynexport.exporter.families.class_defaults import CLASS_DEFAULTS
from dynexport.exporter.families.class_fields import HARMLESS

PAGE = DOCS / "config-fields.md"


def table() -> str:
    """Return the table of fields that a family reads or fixes; families that treat a field alike share a row."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for model_type in sorted(families()):
        for name, done in asked_fields({"model_type": model_type}).items():
            default = CLASS_DEFAULTS[model_type].get(name)
            absent = "" if default is None or not done.startswith("read") else f"`{json.dumps(default)}`"
            rows.setdefault((name, absent, done), []).append(model_type)
    lines = [[f"`{name}`", _listed(names), absent, done] for (name, absent, done), names in sorted(rows.items())]
    return markdown(["Field", "Families", "Absent means", "What is done"], lines)


def _listed(names: list[str]) -> str:
    others = sorted(families().keys() - set(names))
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < len(names) / 2 else ", ".join(names)


def harmless() -> str:
    """Return the fields without effect, in one paragraph."""
    return ", ".join(f"`{name}`" for name in sorted(HARMLESS)) + ".\n"


def page() -> str:
    """Return the text of docs/config-fields.md with the tables of the code."""
    with_fields = with_table(PAGE.read_text(), Path(__file__).name, table())
    return with_table(with_fields, "harmless", harmless())


if __name__ == "__main__":
    PAGE.write_text(page())
