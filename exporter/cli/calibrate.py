"""``dynexport calibrate``: find router thresholds by which a given share of tokens runs, or the fastest drafts."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import bundle_argument, read_text, threads_option
from dynexport.exporter.cli.calibrate_drafts import calibrate_drafts
from dynexport.exporter.cli.calibrate_ngrams import calibrate_ngrams
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.text.text import Text

if TYPE_CHECKING:
    from dynexport.exporter.bundle.cache_use import CacheUse
    from dynexport.exporter.strategies.calibration import Calibration
    from dynexport.runtime.bundle.manifest import Source


@click.command(
    epilog="""\b
Examples:
  dynexport calibrate mod --text book.txt
  dynexport calibrate mod --text book.txt --target-rate 0.25 --window 512 --max-tokens 16384 --json calibration.json
  dynexport calibrate smollm2 --speculate report.txt
  dynexport calibrate smollm2 --ngrams answers.txt --ngrams more.txt --speculate report.txt"""
)
@bundle_argument
@click.option(
    "--text",
    "text_path",
    type=click.Path(path_type=Path),
    help="UTF-8 text: a file, a pipe, or '-' for standard input.",
)
@click.option(
    "--speculate",
    metavar="TEXT",
    type=click.Path(path_type=Path),
    help="Find the depth or layers and the number of drafts that decode a text like this one fastest, and store them "
    "in BUNDLE, where --speculate of the other commands finds them.",
)
@click.option(
    "--ngrams",
    metavar="TEXT",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Learn from texts like the model's answers what follows short token sequences, and store it in BUNDLE, where "
    "--speculate of the other commands drafts by it; best are answers of the model. Can be given several times.",
)
@click.option(
    "--target-rate", type=float, help="Share of the tokens that each routed layer runs.  [default: the capacity]"
)
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option(
    "--max-tokens", type=int, default=4096, show_default=True, help="Maximum number of tokens to use from the text."
)
@click.option("--batch", type=int, default=8, show_default=True, help="Maximum number of windows that run together.")
@threads_option
@json_option
def calibrate(
    bundle: Path,
    text_path: Path | None,
    speculate: Path | None,
    ngrams: tuple[Path, ...],
    target_rate: float | None,
    window: int,
    max_tokens: int,
    batch: int,
    threads: int,
    json_path: str | None,
) -> None:
    """Find thresholds for the routed layers of BUNDLE on a text, and show how to apply them. With int8 KV caches, also
    show how well their scales suit the text. With --speculate, find the fastest drafts for a text, and store them.
    With --ngrams, learn a table that drafts; with both, the table is learned first.

    \b
    rate   share of the tokens that a layer runs by its causal threshold
    flips  share of the tokens for which top-k, the rule of training, decides differently
    at end share of an int8 cache's keys or values at an end of the range, where larger ones are cut off
    """
    from dynexport.exporter.bundle.cache_use import measure_cache_use
    from dynexport.exporter.strategies import strategies
    from dynexport.exporter.strategies.calibration import CalibrationOptions

    out = Output(json_path)
    drafts = speculate is not None or bool(ngrams)
    if (text_path is None) != drafts or (drafts and target_rate is not None):
        raise click.UsageError("expected --text TEXT, or --speculate TEXT, --ngrams TEXT or both without --target-rate")
    opened = Bundle.open(bundle)
    if text_path is None:
        found: dict[str, Any] = {}
        if ngrams:
            found["ngrams"] = calibrate_ngrams(out, opened, ngrams, window=window)
            opened = Bundle.open(bundle)
        if speculate is not None:
            found |= calibrate_drafts(out, opened, speculate, window=window, max_tokens=max_tokens, threads=threads)
        out.report(found)
        return
    ids = Text.of_bundle(opened).encode(read_text(text_path, max_tokens))
    strategy = strategies()[opened.manifest.contract.strategy]
    options = CalibrationOptions(target_rate, window, max_tokens, batch, threads)
    report: dict[str, Any] = {"text": str(text_path)}
    rounded, manifest = opened.manifest.cache_text is not None, opened.manifest
    if manifest.routing is not None or target_rate is not None or not rounded:
        with out.progress("calibrating") as bar:
            done = strategy.calibrate(opened, ids, replace(options, progress=bar.update))
        title = f"{text_path.name}: {done.tokens} tokens in windows of {window}, of which top-k chooses {done.k} each"
        out.table(title, *_table(done))
        apply = _command(manifest.source, done)
        out.say("To apply them, convert again, with any other options that the bundle was made with:")
        out.say(apply)
        report |= {**done.model_dump(), "thresholds": done.thresholds, "apply": apply}
    if rounded:
        uses = measure_cache_use(opened, ids, options)
        out.table(f"{text_path.name}: int8 caches", *_cache_table(uses))
        out.say("If much more than 0.1 % is at an end, convert again with --kv-cache-text and a text like this one.")
        report["caches"] = [use.model_dump() for use in uses]
    out.report(report)


def _cache_table(uses: list[CacheUse]) -> tuple[list[str], list[list[str]]]:
    columns = ["layer", "entries", "keys at end", "largest", "values at end", "largest"]
    rows = [
        [
            str(use.place),
            str(use.entries),
            f"{use.keys_at_end:.3%}",
            str(use.largest_key),
            f"{use.values_at_end:.3%}",
            str(use.largest_value),
        ]
        for use in uses
    ]
    return columns, rows


def _table(done: Calibration) -> tuple[list[str], list[list[str]]]:
    columns = ["layer", "rate now", "flips", "threshold now", f"for {done.target_rate:.2%}", "rate then", "flips"]
    rows = []
    for layer in done.layers:
        now, then = layer.now, layer.calibrated
        figures = [f"{now.rate:.2%}", f"{now.flips:.2%}", f"{now.threshold:.6g}"]
        rows.append([str(layer.layer), *figures, f"{then.threshold:.6g}", f"{then.rate:.2%}", f"{then.flips:.2%}"])
    return columns, rows


def _command(source: Source, done: Calibration) -> str:
    how = ["--import", source.importer] if source.importer else []
    how += ["--adapter", source.adapter] if source.adapter else []
    thresholds = f"thresholds={json.dumps(done.thresholds)}"
    return shlex.join(["dynexport", "convert", source.model, *how, "--set", thresholds, "-o", "BUNDLE"])
