"""``dynexport eval``: what skipping costs, as perplexity on a text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dynexport.exporter.cli.arguments import (
    backend_option,
    bundle_argument,
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
@click.option("--speedup", help="Compare this ratio only with full depth.  [default: all that the bundle declares]")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option("--prompt-tokens", type=int, default=64, show_default=True, help="Of these, run as prompt at full depth.")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="Use at most so many tokens of the text.")
@click.option("--batch", type=int, default=8, show_default=True, help="Most windows that run together.")
@backend_option
@trust_option
@threads_option
@json_option
def evaluate(
    bundle: Path,
    text_path: Path,
    speedup: str | None,
    window: int,
    prompt_tokens: int,
    max_tokens: int,
    batch: int,
    backend: RunBackend,
    trust_engines: bool,
    threads: int,
    json_path: str | None,
) -> None:
    """Perplexity of BUNDLE on a text, teacher-forced through the decode path that serves.

    The first tokens of every window run as a prompt does; the rest are decoded one by one, in the kept layers or
    where routers say, and only these count. The depth is how many layers such a token ran in, on average.
    """
    from dynexport.runtime.measure.evaluate import evaluate as measure

    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    ids = Text.of_bundle(opened).encode(read_text(text_path, max_tokens))
    dense = opened.depth(1)
    compared = opened.manifest.depths if speedup is None else (opened.depth(speedup),)
    with out.progress("evaluating") as bar:
        results = measure(
            opened,
            ids,
            speedups=[dense, *(s for s in compared if s.ratio != dense.ratio)],
            window=window,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            batch=batch,
            backend=backend,
            threads=threads,
            progress=bar.update,
        )
    columns = ["", "layers", "depth", "perplexity"]
    rows = [[result.name, str(result.layers), _depth(result), f"{result.perplexity:,.2f}"] for result in results]
    if not opened.manifest.has_routers:
        columns.append("against dense")
        rows = [
            [*row, f"{result.perplexity / results[0].perplexity:.2f}x"]
            for row, result in zip(rows, results, strict=True)
        ]
    out.table(f"Perplexity on {text_path.name}, {results[0].tokens} decoded tokens", columns, rows)
    if warning := not_trained(opened.manifest, compared):
        out.warn(warning)
    out.report(
        {
            "text": str(text_path),
            "window": window,
            "prompt_tokens": prompt_tokens,
            "results": [r.model_dump() for r in results],
        }
    )


def _depth(result: Evaluation) -> str:
    return "-" if math.isnan(result.depth) else f"{result.depth:.2f}"
