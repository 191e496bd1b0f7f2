"""Write the tables of docs/triton.md from the code: `python samples/docs_triton.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from docs_families import DOCS, markdown, with_table

from dynexport.runtime.serving.triton.fields import INPUTS, OUTPUTS, SETTINGS, Tensor
from dynexport.runtime.serving.triton.metrics import METRICS

PAGE = DOCS / "triton.md"


def tensors(shown: Sequence[Tensor]) -> str:
    """Return a table of inputs or outputs."""
    rows = [
        [f"`{tensor.name}`", f"`{tensor.kind}`", "any number" if tensor.several else "one", tensor.text]
        for tensor in shown
    ]
    return markdown(["Name", "Type", "Values", "What it is"], rows)


def settings() -> str:
    """Return the table of settings."""
    rows = [[f"`{setting.name}`", f"`{setting.default}`" * bool(setting.default), setting.text] for setting in SETTINGS]
    return markdown(["Setting", "Default", "What it is"], rows)


def metrics() -> str:
    """Return the table of metrics."""
    return markdown(["Metric", "What it is"], [[f"`{name}`", text] for name, text in METRICS.items()])


def page() -> str:
    """Return the text of docs/triton.md with the tables of the code."""
    name, text = Path(__file__).name, PAGE.read_text()
    for what, table in (
        ("inputs", tensors(INPUTS)),
        ("outputs", tensors(OUTPUTS)),
        ("settings", settings()),
        ("metrics", metrics()),
    ):
        text = with_table(text, f"{name}, {what}", table)
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
