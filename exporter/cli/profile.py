"""``dynexport profile``: measure the contribution of each residual block of a dense checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import read_text, text_option
from dynexport.exporter.cli.output import Output, json_option, layers_text
from dynexport.runtime.bundle.errors import DynexportError, require_module
from dynexport.runtime.bundle.machine import available_cores

if TYPE_CHECKING:
    from dynexport.exporter.checkpoint import Checkpoint
    from dynexport.exporter.profile import Measured, Profile, ProfileDirectory
    from dynexport.exporter.profile.model import Spread
    from dynexport.runtime.text.text import Text

_MOST_THREADS = 256
_SHORT = {"attention": "attn", "mlp": "MLP"}  # the table has to fit into 80 columns


@click.command(
    epilog="""\b
Examples:
  dynexport profile ./SmolLM2-135M-Instruct --text book.txt
  dynexport profile model.gguf --text book.txt --budget 0.5 -o pictures
  dynexport profile ./model --text book.txt --skip 3 --window 512 --max-tokens 65536 --json -"""
)
@click.argument("model")
@text_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Directory for the pictures and profile.json.  [default: the table only]",
)
@click.option("--skip", type=int, help="Number of layers to select for skipping.")
@click.option("--budget", type=float, help="Share of the layers to keep; the others are selected for skipping.")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens per window.")
@click.option(
    "--max-tokens", type=int, default=4096, show_default=True, help="Maximum number of tokens to use from the text."
)
@click.option("--batch", type=int, default=8, show_default=True, help="Windows that run together.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A tokenizer.json, or a directory with one, instead of the model's.",
)
@click.option("--threads", type=int, default=available_cores, show_default="all cores", help="Threads of PyTorch.")
@json_option
def profile(
    model: str,
    text_path: Path,
    output: Path | None,
    skip: int | None,
    budget: float | None,
    window: int,
    max_tokens: int,
    batch: int,
    tokenizer: Path | None,
    threads: int,
    json_path: str | None,
) -> None:
    """Measure how much each residual block of MODEL, a dense checkpoint, contributes to hidden_states on a text.

    \b
    R/x         |R(x)| / |x|: update / input of a block, median over tokens
    R/y         |R(x)| / |x + R(x)|: update / output of a block, median over tokens
    1-cos       block influence: 1 - cos(x, x + R(x)) of the whole layer, mean over tokens
    skip order  1 for the layer with the least block influence
    """
    from dynexport.exporter.profile import ProfileDirectory, measure, summarise
    from dynexport.exporter.strategies.importing import open_imported

    if skip is not None and budget is not None:
        raise click.UsageError("expected --skip or --budget, found both")
    out = Output(json_path)
    directory = None if output is None else ProfileDirectory(output)
    _use_threads(threads)
    checkpoint = open_imported(model, tokenizer=tokenizer)
    count = _layers_to_skip(checkpoint, skip, budget)
    text = _text_of(checkpoint)
    ids = text.encode(read_text(text_path, max_tokens))
    with out.progress("profiling") as bar:
        measured = measure(checkpoint, ids, window=window, max_tokens=max_tokens, batch=batch, progress=bar.update)
    done = summarise(measured)
    out.table(f"{text_path.name}: medians over {done.tokens} tokens in windows of {done.window}", *_table(done))
    for line in _overall(done):
        out.say(line)
    plan = {} if count is None else _plan(done, model, count)
    if plan:
        _say_plan(out, plan)
    report = {"model": model, "text": str(text_path), **done.model_dump(mode="json"), **plan}
    if directory is not None:
        _write(out, directory, done, measured, text, report)
    out.report(report)


def _use_threads(threads: int) -> None:
    if not 1 <= threads <= _MOST_THREADS:
        raise DynexportError(f"threads: expected 1..{_MOST_THREADS}, found {threads}")
    require_module("torch", "torch", "profile a checkpoint")
    import torch

    torch.set_num_threads(threads)


def _layers_to_skip(checkpoint: Checkpoint, skip: int | None, budget: float | None) -> int | None:
    """Return the number of layers to skip, checked before anything runs; None without --skip and --budget."""
    from dynexport.exporter.checkpoint.sizes import check_sizes
    from dynexport.exporter.families import read_architecture
    from dynexport.exporter.profile import layers_to_skip

    if skip is None and budget is None:
        return None
    check_sizes(checkpoint)
    return layers_to_skip(read_architecture(checkpoint.config).layers, skip=skip, budget=budget)


def _text_of(checkpoint: Checkpoint) -> Text:
    from dynexport.runtime.text.text import Text

    text = Text.from_files(checkpoint.files)
    if not text.has_tokenizer:
        raise DynexportError(f"{checkpoint.source}: expected a tokenizer.json, found none; name one with --tokenizer")
    return text


def _table(done: Profile) -> tuple[list[str], list[list[str]]]:
    names = list(done.blocks) if len(done.blocks) > 1 else []
    columns = ["layer"]
    for name in (*names, "layer"):
        columns += [f"{_SHORT.get(name, name)} R/x", "R/y"]
    rows = []
    for layer in done.layers:
        parts = [*(layer.blocks[name] for name in names), layer.whole]
        figures = [_percent(value) for part in parts for value in (part.of_input.median, part.of_output.median)]
        rows.append([str(layer.layer), *figures, f"{layer.influence:.4f}", str(layer.skip_order + 1)])
    return [*columns, "1-cos", "skip order"], rows


def _percent(value: float) -> str:
    return f"{value:.1%}" if value < 10 else f"{value:.0%}"


def _overall(done: Profile) -> list[str]:
    """Return lines with the medians over all blocks."""
    parts = [("all residual blocks", done.all_blocks)]
    if len(done.blocks) > 1:
        parts += [
            ("attention", done.blocks["attention"]),
            ("MLP", done.blocks["mlp"]),
            ("whole layers", done.all_layers),
        ]
    return [f"{name}: {_spread('R/x', part.of_input)}; {_spread('R/y', part.of_output)}" for name, part in parts]


def _spread(name: str, spread: Spread) -> str:
    return f"median {name} {_percent(spread.median)} (10 to 90 %: {_percent(spread.p10)} to {_percent(spread.p90)})"


def _plan(done: Profile, model: str, count: int) -> dict[str, Any]:
    """Return the skipped and kept layers, and the command that converts such a bundle."""
    from dynexport.exporter.strategies import strategies

    skipped = done.least(count)
    kept = [layer.layer for layer in done.layers if layer.layer not in skipped]
    keep = ",".join(map(str, kept))
    strategy = next(name for name, strategy in strategies().items() if strategy.has_ratios)
    command = ["dynexport", "convert", model, "--strategy", strategy, "--keep", keep, "-o", "BUNDLE"]
    return {"skipped": list(skipped), "kept": kept, "convert": shlex.join(command)}


def _say_plan(out: Output, plan: dict[str, Any]) -> None:
    skipped, kept = plan["skipped"], plan["kept"]
    which = f"skipped (least block influence): {layers_text(skipped)}" if skipped else "none skipped"
    out.say(f"{len(kept)} of {len(kept) + len(skipped)} layers kept; {which}")
    out.say("This does not measure quality. Convert, then measure it with dynexport eval BUNDLE --text FILE:")
    out.say(plan["convert"])


def _write(
    out: Output, directory: ProfileDirectory, done: Profile, measured: Measured, text: Text, report: dict[str, Any]
) -> None:
    from dynexport.exporter.profile.pictures import SHOWN
    from dynexport.exporter.trace import Token

    first = measured.tokens[:SHOWN].tolist()
    tokens = Token.sequence(first, text, len(first))
    for path in directory.write(done, measured, tokens, report, Path(report["model"]).name or report["model"]):
        out.say(f"wrote {path}")
