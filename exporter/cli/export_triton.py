"""``dynexport export-triton``: write a bundle as a model of NVIDIA Triton Inference Server."""

from __future__ import annotations

from pathlib import Path

import click

from dynexport.exporter.cli.arguments import backend_option, bundle_argument
from dynexport.exporter.cli.output import Output, json_option
from dynexport.exporter.triton.repository import export
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.engines.registry import RunBackend
from dynexport.runtime.serving.triton.fields import SETTINGS
from dynexport.runtime.serving.triton.loading import read_settings

_DEFAULTS = {setting.name: setting.default for setting in SETTINGS}


@click.command(
    epilog="""\b
Examples:
  dynexport export-triton smollm2 -o models
  dynexport export-triton smollm2 -o models --name chat --threads 4 --max-rows 16 --force
  tritonserver --model-repository models"""
)
@bundle_argument
@click.option(
    "-o",
    "--output",
    "repository",
    required=True,
    type=click.Path(path_type=Path),
    help="The model repository; its other models are left as they are.",
)
@click.option("--name", help="The model's name in Triton.  [default: the bundle's directory]")
@click.option("--link", is_flag=True, help="Link to the bundle, in place of a copy: for a repository that stays here.")
@click.option("--force", is_flag=True, help="Replace an earlier export of this name.")
@click.option("--threads", type=int, help="Threads of ONNX Runtime.  [default: all cores of Triton's machine]")
@click.option("--max-rows", type=int, help=f"Answers that run at a time.  [default: {_DEFAULTS['max_rows']}]")
@click.option("--max-length", type=int, help="Most tokens of a prompt and its answer.  [default: the model's context]")
@click.option("--chunk", type=int, help=f"Tokens of a prompt's first chunk.  [default: {_DEFAULTS['chunk']}]")
@click.option("--queue", type=int, help=f"Requests that may wait.  [default: {_DEFAULTS['queue']}]")
@click.option(
    "--prefix-bytes", type=int, help=f"Memory for known prefixes; 0 for none.  [default: {_DEFAULTS['prefix_bytes']}]"
)
@click.option(
    "--drain-seconds",
    type=float,
    help=f"Seconds to finish when it is unloaded.  [default: {_DEFAULTS['drain_seconds']}]",
)
@backend_option
@json_option
def export_triton(
    bundle: Path,
    repository: Path,
    name: str | None,
    link: bool,
    force: bool,
    backend: RunBackend,
    json_path: str | None,
    **settings: float | None,
) -> None:
    """Write BUNDLE as a model into a model repository of NVIDIA Triton Inference Server.

    The model runs in Triton's Python backend and streams: many requests at a time, each at its own depth. Triton's
    Python needs dynexport. The options are settings in the model's config.pbtxt, and can be changed there.
    """
    out = Output(json_path)
    given = {
        option: f"{value:g}" if isinstance(value, float) else str(value)
        for option, value in settings.items()
        if value is not None
    }
    given["backend"] = backend
    read_settings(given)
    opened = Bundle.open(bundle)
    with out.progress("copying") as bar:
        place = export(
            opened,
            repository,
            name or bundle.resolve().name,
            given,
            link=link,
            force=force,
            progress=bar.working_on,
        )
    out.facts(
        f"Model {place.name}",
        [
            ("directory", str(place)),
            ("bundle", f"a link to {opened.path.resolve()}" if link else "a copy"),
            ("start", f"tritonserver --model-repository {repository}"),
        ],
    )
    out.report({"name": place.name, "directory": str(place), "linked": link, "settings": given})


__all__ = ["export_triton"]
