"""``dynexport build``: build the TensorRT engines of a bundle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from dynexport.exporter.cli.arguments import bundle_argument
from dynexport.exporter.cli.engines import engine_report
from dynexport.exporter.cli.output import Output, ProgressBar, bytes_text, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import ENGINES, Graph
from dynexport.runtime.engines.tensorrt.backend import (
    BACKENDS,
    Backend,
    BackendName,
    BuildTarget,
    choose_target,
    open_backend,
)
from dynexport.runtime.engines.tensorrt.build import Built, build_engine
from dynexport.runtime.engines.tensorrt.builder import Builder
from dynexport.runtime.engines.tensorrt.gpu import find_gpu
from dynexport.runtime.engines.tensorrt.plugins import PluginLibrary, our_plugins
from dynexport.runtime.engines.tensorrt.shapes import profiles_text


@click.command(
    epilog="""\b
Examples:
  dynexport build smollm2 --backend tensorrt
  dynexport build smollm2 --backend tensorrt-rtx --compute-capability 8.0,8.9,12.0
  dynexport build mod --backend tensorrt-rtx --plugins"""
)
@bundle_argument
@click.option(
    "--backend",
    "backend_name",
    required=True,
    type=click.Choice(BACKENDS),
    help="tensorrt builds for the GPU of this machine; tensorrt-rtx also builds for others, without a GPU.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="LIST",
    help="Build for these, such as 8.0,8.9,12.0.  [default: this machine's GPU; without one, all from 8.0 on]",
)
@click.option(
    "--plugins",
    "with_ours",
    is_flag=True,
    help="Use dynexport's Python plugins for its custom operators (convert --plugins), not their ONNX bodies.",
)
@click.option(
    "--plugin-library",
    type=click.Path(path_type=Path),
    help="Use a compiled library of TensorRT plugins, for programs that load it; `dynexport run` does not.",
)
@click.option(
    "--strip",
    is_flag=True,
    help="Build engines without weights; they load the bundle's weights when opened. Needs a GPU.",
)
@click.option("--force", is_flag=True, help="Build again even if an engine is up to date.")
@json_option
def build(
    bundle: Path,
    backend_name: BackendName,
    capabilities: str | None,
    with_ours: bool,
    plugin_library: Path | None,
    strip: bool,
    force: bool,
    json_path: str | None,
) -> None:
    """Build a TensorRT engine for every graph of BUNDLE and store it there, with profiles for prefill and decode.

    An up-to-date engine is reused: one of the same model, backend version, target, plugins and --strip.
    """
    if with_ours and plugin_library:
        raise click.UsageError("expected --plugins or --plugin-library, found both")
    out = Output(json_path)
    wanted = _capabilities(capabilities)
    opened = Bundle.open(bundle)
    opened.check()
    backend = open_backend(backend_name)
    target = choose_target(backend, wanted, find_gpu())
    plugins = our_plugins() if with_ours else None
    if plugin_library:
        plugins = PluginLibrary.from_file(plugin_library)
    built = []
    with Builder() as builder:
        for graph in opened.manifest.graphs:
            with out.progress(f"building {graph.file}:") as bar:
                done = build_engine(
                    opened,
                    graph,
                    backend,
                    target,
                    plugins=plugins,
                    strip=strip,
                    force=force,
                    builder=builder,
                    progress=partial(_working_on, bar),
                )
            if done.damaged:
                out.warn(f"{done.damaged}; it was built again")
            built.append(done)
    _show(out, opened, backend, target, built)


def _working_on(bar: ProgressBar, phase: str, step: int, steps: int) -> None:
    bar.working_on(phase.lower(), step, steps)


def _show(out: Output, bundle: Bundle, backend: Backend, target: BuildTarget, built: Sequence[Built]) -> None:
    """Show the engines in a table and in the report."""
    out.table(
        f"Engines in {bundle.path / ENGINES}, for {target}, by {backend.name} {backend.version}",
        ["graph", "profiles", "size", "seconds", "peak memory", ""],
        [_row(graph, done) for graph, done in zip(bundle.manifest.graphs, built, strict=True)],
    )
    if all(done.cached for done in built):
        out.say("every engine is up to date; nothing was built (--force builds again)")
    out.report(
        {
            "backend": backend.name,
            "backend_version": backend.version,
            "compute_capabilities": target.compute_capabilities,
            "gpu": target.gpu,
            "engines": [{**engine_report(done.stored), "cached": done.cached} for done in built],
        }
    )


def _row(graph: Graph, done: Built) -> list[str]:
    record = done.stored.record
    return [
        graph.file,
        profiles_text(record.profiles) or "fixed sizes",
        bytes_text(record.engine.bytes),
        "-" if done.cached else f"{record.build_seconds:.1f}",
        bytes_text(record.peak_bytes),
        "cached" if done.cached else "built",
    ]


def _capabilities(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    for part in parts:
        if not re.fullmatch(r"\d{1,2}\.\d", part, re.ASCII):
            raise click.BadParameter(
                f"expected compute capabilities separated by commas, such as 8.0,8.9; found {part!r:.40}",
                param_hint="--compute-capability",
            )
    return parts
