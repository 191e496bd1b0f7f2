"""``dynexport eval``: measure perplexity on a text at full depth and with skipped layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynexport.exporter.cli.arguments import (
    backend_option,
    bundle_argument,
    depth_option,
    read_text,
    text_option,
    threads_option,
    trust_option,
)
from dynexport.exporter.cli.describe import not_trained
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.text.text import Text

if TYPE_CHECKING:
    from dynexport.runtime.bundle.manifest import Manifest
    from dynexport.runtime.measure.evaluate import Evaluation


@click.command(
    name="eval",
    epilog="""\b
Examples:
  dynexport eval smollm2 --text book.txt
  dynexport eval smollm2 --text book.txt --speedup 2 --window 512 --max-tokens 8192 --json eval.json""",
)
@bundle_argument
@text_option
@depth_option("Compare only this ratio with full depth.  [default: every ratio of the bundle]")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option(
    "--prompt-tokens",
    type=int,
    default=64,
    show_default=True,
    help="Prompt tokens per window; only later tokens count.",
)
@click.option(
    "--max-tokens", type=int, default=2048, show_default=True, help="Maximum number of tokens to use from the text."
)
@click.option("--batch", type=int, default=8, show_default=True, help="Maximum number of windows that run together.")
@backend_option
@trust_option
@threads_option
@json_option
def evaluate(
    bundle: Path,
    text_path: Path,
    depth: str | None,
    window: int,
    prompt_tokens: int,
    max_tokens: int,
    batch: int,
    backend: RunBackend,
    trust_engines: bool,
    threads: int,
    json_path: str | None,
) -> None:
    """Measure the perplexity of BUNDLE on a text, with teacher forcing.

    The first tokens of every window are a prompt. The others are decode steps in the kept layers, or in the layers that
    routers choose, and only these count. The depth is the mean number of layers that such a token ran.
    """
    from dynexport.runtime.measure.compared import compared_depths
    from dynexport.runtime.measure.evaluate import evaluate as measure

    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    ids = Text.of_bundle(opened).encode(read_text(text_path, max_tokens))
    depths = compared_depths(opened, depth)
    with out.progress("evaluating") as bar:
        results = measure(
            opened,
            ids,
            depths=depths,
            window=window,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            batch=batch,
            backend=backend,
            threads=threads,
            progress=bar.update,
        )
    title = f"Perplexity on {text_path.name}, {results[0].tokens} decoded tokens"
    out.table(title, *_table(results, opened.manifest))
    if warning := not_trained(opened.manifest, depths):
        out.warn(warning)
    sizes = {"window": window, "prompt_tokens": prompt_tokens}
    out.report({"text": str(text_path), **sizes, "results": [result.model_dump() for result in results]})


def _table(results: Sequence[Evaluation], manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows; a bundle with routers has no comparison with full depth."""
    columns, rows = ["", "layers", "depth", "perplexity"], []
    if manifest.routing is None:
        columns.append("against full")
    for result in results:
        depth = "-" if math.isnan(result.depth) else f"{result.depth:.2f}"
        row = [result.name, f"{result.layers} of {manifest.model.layers}", depth, f"{result.perplexity:,.2f}"]
        against = [f"{result.perplexity / results[0].perplexity:.2f}x"] if manifest.routing is None else []
        rows.append([*row, *against])
    return columns, rows
