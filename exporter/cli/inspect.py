"""``dynexport inspect``: show the content of a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from dynexport.exporter.cli.arguments import bundle_argument, trust_option
from dynexport.exporter.cli.describe import bundle_report, depth_table, describe_bundle
from dynexport.exporter.cli.engines import show_engines
from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import PAST, PRESENT, Graph, LayerRouting, Manifest, PathRouting, Program

# A set may have hundreds of graphs.
_SHOWN_GRAPHS = 6


@click.command(
    epilog="""\b
Examples:
  dynexport inspect smollm2
  dynexport inspect smollm2 --json - | jq .depths
  dynexport inspect downloaded --check
  dynexport inspect smollm2 --engine"""
)
@bundle_argument
@click.option(
    "--engine",
    is_flag=True,
    help="Show the TensorRT engines instead: what each was built for, and whether it runs here.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Hash every file, also weights; use it after a download. Otherwise files above 64 MiB are not hashed.",
)
@trust_option
@json_option
def inspect(bundle: Path, engine: bool, check: bool, trust_engines: bool, json_path: str | None) -> None:
    """Check BUNDLE's files against its manifest and show its content."""
    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    if check:
        from dynexport.runtime.text.text_checks import check_text

        opened.check()
        check_text(opened)
    if engine:
        out.report({"engines": show_engines(out, opened)})
    else:
        _show_bundle(out, opened)


def _show_bundle(out: Output, bundle: Bundle) -> None:
    manifest = bundle.manifest
    out.facts(f"Bundle {bundle.path}", [*describe_bundle(manifest), ("source", manifest.source.model)])
    if manifest.depths:
        out.table("Kept layers", *depth_table(manifest))
    out.table("Programs", ["phase", "depth", "graphs"], [_program_row(program) for program in manifest.programs])
    _show_interface(out, manifest)
    files = [[name, bytes_text(file.bytes), file.sha256[:16]] for name, file in manifest.files.items()]
    out.table("Files", ["name", "size", "sha256"], files)
    out.facts("Made with", list(manifest.tools.items()))
    operators = {"operators": _show_operators(out, bundle)} if manifest.target == "tensorrt" else {}
    out.report(bundle_report(manifest) | operators)


def _program_row(program: Program) -> list[str]:
    names = list(dict.fromkeys(program.names))
    shown = (
        names
        if len(names) <= _SHOWN_GRAPHS
        else [*names[: _SHOWN_GRAPHS - 1], f"and {len(names) - _SHOWN_GRAPHS + 1} more"]
    )
    return [program.phase, program.depth or "any", ", ".join(shown)]


def _show_interface(out: Output, manifest: Manifest) -> None:
    """Show inputs and outputs of the prompt's graph; for a set of graphs, of its attention graph."""
    program = manifest.program("prompt", manifest.full)
    if program.set is not None:
        graph = manifest.graph(program.set.attention)
        out.table(f"{graph.file} (called for the cache of every {_place(manifest)})", *_tensors(graph, ()))
    else:
        graph, shown = manifest.graph(program.names[0]), _shown_places(manifest)
        which = " and of routed layer ".join(shown)
        heads = {part.shape[1] for cache in manifest.caches for name, part in cache.parts.items() if name == "key"}
        others = "alike" if len(heads) < 2 else "with their own heads"
        title = f"{graph.file} (caches of {_place(manifest)} {which}; the others {others})"
        out.table(title, *_tensors(graph, shown))


def _tensors(graph: Graph, places: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: a graph's tensors; caches only of ``places`` if they are numbered."""
    rows = [
        [spec.name, way, spec.dtype, " x ".join(map(str, spec.shape))]
        for way, specs in (("input", graph.inputs), ("output", graph.outputs))
        for spec in specs
        if graph.places is None or not spec.name.startswith((PAST, PRESENT)) or spec.name.split(".")[1] in places
    ]
    return ["tensor", "", "type", "shape"], rows


def _place(manifest: Manifest) -> str:
    """Return the word for a cache's place: "hop" or "layer"."""
    routing = manifest.routing
    return "hop" if isinstance(routing, PathRouting) and routing.places == "hops" else "layer"


def _shown_places(manifest: Manifest) -> list[str]:
    """Return the first place that is not a routed layer, and the first that is."""
    routed = manifest.routing.layers if isinstance(manifest.routing, LayerRouting) else ()
    plain = [cache.place for cache in manifest.caches if cache.place not in routed and cache.parts]
    return [str(place) for place in (*plain[:1], *routed[:1])]


def _show_operators(out: Output, bundle: Bundle) -> dict[str, Any]:
    """Show each graph's operators and which are dynexport's own; return them for the JSON report."""
    from dynexport.exporter.bundle.operators import count_operators, ours

    found = {graph.name: count_operators(bundle.path / graph.file) for graph in bundle.manifest.files_with_graphs}
    rows = [
        [
            name,
            str(counts.total()),
            str(len(counts)),
            ", ".join(f"{op} x{n}" for op, n in ours(counts).items()) or "none",
        ]
        for name, counts in found.items()
    ]
    out.table("Operators", ["graph", "nodes", "operators", "custom: a plugin or the ONNX body"], rows)
    return {name: {"nodes": counts.total(), "ours": ours(counts)} for name, counts in found.items()}
