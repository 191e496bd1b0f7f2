"""``dynexport eval``: what skipping costs, as perplexity on a text."""

from __future__ import annotations

import codecs
from pathlib import Path

import click

from dynexport.exporter.cli.arguments import bundle_argument, threads_option
from dynexport.exporter.cli.describe import NOT_TRAINED
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.errors import DynexportError


@click.command(
    name="eval",
    epilog="""\b
Examples:
  dynexport eval smollm2 --text book.txt
  dynexport eval smollm2 --text book.txt --speedup 2 --window 512 --max-tokens 8192 --json eval.json""",
)
@bundle_argument
@click.option("--text", "text_path", required=True, type=click.Path(path_type=Path), help="A UTF-8 text file.")
@click.option("--speedup", help="Compare this ratio only with full depth.  [default: all that the bundle declares]")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option("--prompt-tokens", type=int, default=64, show_default=True, help="Of these, run as prompt at full depth.")
@click.option("--max-tokens", type=int, default=2048, show_default=True, help="Use at most so many tokens of the text.")
@click.option("--batch", type=int, default=8, show_default=True, help="Windows that run together.")
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
    threads: int,
    json_path: str | None,
) -> None:
    """Perplexity of BUNDLE on a text, teacher-forced through the decode path that serves.

    The first tokens of every window run at full depth, as a prompt does; the rest are decoded one by one in the
    kept layers, and only these count.
    """
    from dynexport.runtime.evaluate import evaluate as measure

    out = Output(json_path)
    opened = Bundle.open(bundle)
    ids = opened.text().encode(_read(text_path, max_tokens))
    dense = opened.speedup(1)
    compared = opened.manifest.speedups if speedup is None else (opened.speedup(speedup),)
    with out.progress("evaluating") as bar:
        results = measure(
            opened,
            ids,
            speedups=[dense, *(s for s in compared if s.ratio != dense.ratio)],
            window=window,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            batch=batch,
            threads=threads,
            progress=bar.update,
        )
    rows = [
        [
            result.name,
            str(result.layers),
            f"{result.perplexity:,.2f}",
            f"{result.perplexity / results[0].perplexity:.2f}x",
        ]
        for result in results
    ]
    out.table(
        f"Perplexity on {text_path.name}, {results[0].tokens} decoded tokens",
        ["", "layers", "perplexity", "against dense"],
        rows,
    )
    if len(results) > 1 and not opened.manifest.trained_for_its_strategy:
        out.warn(NOT_TRAINED)
    out.report(
        {
            "text": str(text_path),
            "window": window,
            "prompt_tokens": prompt_tokens,
            "results": [r.model_dump() for r in results],
        }
    )


def _read(path: Path, max_tokens: int) -> str:
    """Enough of the file for the tokens asked for; a token is rarely longer than 16 bytes."""
    limit = 16 * max(1, max_tokens)
    try:
        with path.open("rb") as file:
            content = file.read(limit)
        # The cut may go through a character; the end of the file may not.
        return codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) < limit)
    except OSError as error:
        raise DynexportError(f"{path}: expected a text file, found: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynexportError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error
