"""``dynexport inspect``: what is in a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dynexport.exporter.cli.arguments import bundle_argument, trust_option
from dynexport.exporter.cli.describe import bundle_report, describe_bundle, speedup_table
from dynexport.exporter.cli.engines import show_engines
from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import PAST, PRESENT, Manifest

_CACHES = (PAST, PRESENT)


@click.command(
    epilog="""\b
Examples:
  dynexport inspect smollm2
  dynexport inspect smollm2 --json - | jq .speedups
  dynexport inspect downloaded --check
  dynexport inspect smollm2 --engine"""
)
@bundle_argument
@click.option(
    "--engine", is_flag=True, help="Show the TensorRT engines instead: what each is for, and whether it runs here."
)
@click.option(
    "--check",
    is_flag=True,
    help="Hash every file, weights too. Without it, files of up to 64 MiB only; run after a download.",
)
@trust_option
@json_option
def inspect(bundle: Path, engine: bool, check: bool, trust_engines: bool, json_path: str | None) -> None:
    """Check BUNDLE's files against its manifest and show what is in it."""
    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    if check:
        opened.check()
    if engine:
        out.report({"engines": show_engines(out, opened)})
    else:
        _show_bundle(out, opened)


def _show_bundle(out: Output, bundle: Bundle) -> None:
    manifest = bundle.manifest
    out.facts(f"Bundle {bundle.path}", [*describe_bundle(manifest), ("source", manifest.source.model)])
    if manifest.depths:
        out.table("Kept layers", *speedup_table(manifest))
    graph = manifest.graphs[0]
    shown = _shown_layers(manifest)
    interface = [
        [spec.name, way, spec.dtype, " x ".join(map(str, spec.shape))]
        for way, specs in (("input", graph.inputs), ("output", graph.outputs))
        for spec in specs
        if not spec.name.startswith(_CACHES) or spec.name.split(".")[1] in shown
    ]
    which = " and of routed layer ".join(shown)
    place = "place" if graph.role in ("paths", "decode") else "layer"
    out.table(f"{graph.file} (caches of {place} {which}; the others alike)", ["tensor", "", "type", "shape"], interface)
    files = [[name, bytes_text(file.bytes), file.sha256[:16]] for name, file in manifest.files.items()]
    out.table("Files", ["name", "size", "sha256"], files)
    out.facts("Made with", list(manifest.tools.items()))
    operators = {"operators": _show_operators(out, bundle)} if manifest.target == "tensorrt" else {}
    out.report(bundle_report(manifest) | operators)


def _show_operators(out: Output, bundle: Bundle) -> dict[str, Any]:
    """What TensorRT will find in every graph, and for what it may have a plugin; the same for the JSON report."""
    from dynexport.exporter.bundle.operators import count_operators, ours

    found = {graph.name: count_operators(bundle.path / graph.file) for graph in bundle.manifest.graphs}
    rows = [
        [
            name,
            str(counts.total()),
            str(len(counts)),
            ", ".join(f"{op} x{n}" for op, n in ours(counts).items()) or "none",
        ]
        for name, counts in found.items()
    ]
    out.table("Operators", ["graph", "nodes", "operators", "ours: a plugin, or their body"], rows)
    return {name: {"nodes": counts.total(), "ours": ours(counts)} for name, counts in found.items()}


def _shown_layers(manifest: Manifest) -> list[str]:
    """A layer of every kind: the first that is not routed, and the first that is."""
    routed = manifest.routed.layers if manifest.routed else ()
    plain = [layer for layer in range(manifest.model.layers) if layer not in routed]
    return [str(layer) for layer in (*plain[:1], *routed[:1])]
