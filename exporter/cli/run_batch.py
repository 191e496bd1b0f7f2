"""``dynexport run --input``: answer a file of requests, in the form of OpenAI's batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dynexport.exporter.cli.arguments import options
from dynexport.exporter.cli.output import Output
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import require_module
from dynexport.runtime.engines.registry import RunBackend, Weights
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.settings import PREFIX_BYTES, Settings
from dynexport.runtime.serving.worker import Worker

# The parameters of the command that a batch takes besides those of ``Batch``.
_SHARED = ("bundle", "backend", "trust_engines", "threads", "weights", "json_path")


@dataclass(frozen=True)
class Batch:
    """The options of a batch, each by the name of its parameter.

    Attributes:
        requests: the file of requests.
        answers: the file of answers.
        max_rows: number of answers that run at a time.
        max_length: most tokens of a prompt and its answer; None for the model's context.
        name: the bundle's name in the requests; None for its directory's name.
    """

    requests: Path
    answers: Path
    max_rows: int
    max_length: int | None
    name: str | None


def batch_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a batch to a command."""
    return options(
        click.option(
            "--input",
            "requests",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="Answer the requests of a file: OpenAI's batch lines for /v1/chat/completions and /v1/completions.",
        ),
        click.option(
            "-o",
            "--output",
            "answers",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="With --input: write the answers here, a line each, as they are finished.",
        ),
        click.option(
            "--max-rows",
            type=int,
            default=Settings().rows,
            show_default=True,
            help="With --input: answers that run at a time.",
        ),
        click.option(
            "--max-length",
            type=int,
            help="With --input: most tokens of a prompt and its answer.  [default: the model's context]",
        ),
        click.option("--name", help="With --input: the model's name in the requests.  [default: BUNDLE's directory]"),
    )(command)


def take_batch(given: dict[str, Any]) -> tuple[Batch | None, dict[str, Any]]:
    """Split a command's parameters into the batch's options, None without --input, and the others.

    Raises:
        click.UsageError: for an option of a batch without --input, or another option beside it.
    """
    names = [field.name for field in fields(Batch)]
    values, others = {name: given[name] for name in names}, {name: given[name] for name in given if name not in names}
    context = click.get_current_context()
    set_here = [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if values["requests"] is None:
        if wrong := [parameter.opts[-1] for parameter in set_here if parameter.name in names]:
            raise click.UsageError(f"{', '.join(wrong)}: expected with --input, found without")
        return None, others
    if values["answers"] is None:
        raise click.UsageError("--output: expected a file with --input, found none")
    if wrong := [parameter.opts[-1] for parameter in set_here if parameter.name not in (*names, *_SHARED)]:
        raise click.UsageError(
            f"{', '.join(wrong)}: expected without --input, found beside it; a request's body has such settings"
        )
    return Batch(**values), others


def run_batch(
    path: Path,
    batch: Batch,
    backend: RunBackend,
    threads: int,
    json_path: str | None,
    *,
    trust_engines: bool,
    weights: Weights,
) -> None:
    """Answer a file of requests with a bundle, show the progress, and write the report."""
    require_module("fastapi", "serve", "read requests of OpenAI's API")
    from dynexport.runtime.serving.batch.job import answer_file, batch_settings

    out = Output(json_path)
    model = Model(Bundle.open(path, trust_engines=trust_engines), threads, backend=backend, weights=weights)
    worker = Worker(model, batch_settings(batch.max_rows, batch.max_length, PREFIX_BYTES))
    name = batch.name or path.resolve().name
    with out.progress("answering") as bar:
        totals = answer_file(batch.requests, batch.answers, name, worker, bar.update)
    if totals.before:
        out.note(f"{totals.before} of {totals.requests} requests were answered before")
    if totals.errors:
        out.warn(f"{totals.errors} of {totals.answered} answers are errors; {batch.answers} says why, line by line")
    speed = totals.tokens / totals.seconds if totals.seconds else 0.0
    out.say(f"{totals.answered} answers, {totals.tokens} tokens in {totals.seconds:.1f} s, {speed:.1f} tokens/s")
    out.report({"input": str(batch.requests), "output": str(batch.answers), **asdict(totals), "warnings": out.warnings})
