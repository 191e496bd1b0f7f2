"""``dynexport convert``: a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import numbers, options, settings
from dynexport.exporter.cli.describe import bundle_report, depth_table, describe_bundle, not_trained
from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.runtime.bundle.contract import STRATEGY_NAMES

if TYPE_CHECKING:
    from dynexport.exporter.bundle.conversion import Conversion


# How tokens are routed: fields of the contract, and where they come from.
_routing_options = options(
    click.option(
        "--strategy",
        type=click.Choice(STRATEGY_NAMES),
        help="How tokens are routed.  [default: what config.json declares, else dense]",
    ),
    click.option("--speedup", "speedups", type=float, multiple=True, help="Target ratio; may be given several times."),
    click.option(
        "--rule",
        type=click.Choice(["official", "balanced", "modulo"]),
        help="How kept layers follow from a ratio.",
    ),
    click.option("--keep", metavar="0,2,..", help="Kept layers by hand, instead of a ratio."),
    click.option(
        "--set",
        "set_fields",
        metavar="FIELD=VALUE",
        multiple=True,
        help="Any field of the routing contract, as JSON or text; dots reach into objects. May be given several times.",
    ),
    click.option(
        "--import", "importer", metavar="NAME", help="Read what other routing code has written; NAME is astramind."
    ),
)
# The engine that graphs are written for.
_target_options = options(
    click.option(
        "--precision",
        "--dtype",
        "precision",
        type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
        default="fp32",
        show_default=True,
        help="How weights are stored; bf16 for TensorRT only.",
    ),
    click.option(
        "--target",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="The engine that graphs are written for; ONNX Runtime runs both kinds.",
    ),
    click.option("--max-batch", type=int, help="TensorRT: rows that engines are built for.  [default: 8]"),
    click.option(
        "--max-prompt",
        type=int,
        help="TensorRT: tokens of a prompt that a run takes at most.  [default: the context, up to 1024]",
    ),
    click.option(
        "--plugins",
        is_flag=True,
        help="TensorRT: call operators of our own where they serve; with radial also write a graph that decodes.",
    ),
)
# What the bundle holds, and in which form.
_form_options = options(
    click.option(
        "--max-length",
        type=int,
        help="Context of the bundle in tokens.  [default: the model's, with longrope its original length]",
    ),
    click.option(
        "--static",
        is_flag=True,
        help="A graph of just the kept layers per ratio, instead of one with conditions.",
    ),
    click.option(
        "--single-graph",
        is_flag=True,
        help="radial: one graph of all steps without conditions, instead of a set that the runtime calls in turn.",
    ),
    click.option(
        "--layer-capacity",
        type=float,
        metavar="SHARE",
        help="With --single-graph: of a step's tokens, the share that each layer has room for, above 0 and up to 1; "
        "others are turned away and counted.  [default: 1]",
    ),
    click.option(
        "--golden/--no-golden",
        default=True,
        show_default=True,
        help="Keep vectors computed by PyTorch in the bundle, to verify without PyTorch.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="tokenizer.json as it stands, or a directory with a tokenizer, instead of the model's own.",
    ),
)


@click.command(
    epilog="""\b
Examples:
  dynexport convert ./SmolLM2-135M-Instruct --strategy unified-skip --speedup 2 --speedup 3 -o smollm2
  dynexport convert model.gguf --strategy dense --precision int4 -o model-int4
  dynexport convert ./model --strategy unified-skip --keep 0,2,4,7 -o model-skip
  dynexport convert ./mod-model --set decision.threshold=0.4 --set cache.capacity=0.25 -o mod
  dynexport convert ./mod-model --set 'thresholds={"1": 0.41, "3": 0.52}' -o mod
  dynexport convert ./trained --import astramind -o mod
  dynexport convert ./model --target tensorrt --precision fp16 --max-length 4096 --max-batch 4 -o engine-ready
  dynexport convert ./radial-model --single-graph --layer-capacity 0.5 -o radial"""
)
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory of the bundle; an earlier bundle there is replaced.",
)
@_routing_options
@_target_options
@_form_options
@json_option
def convert(
    model: str,
    output: Path,
    keep: str | None,
    set_fields: tuple[str, ...],
    single_graph: bool,
    layer_capacity: float | None,
    json_path: str | None,
    **named: Any,
) -> None:
    """Convert MODEL: a Hugging Face directory, a hub id, or a .gguf file."""
    from dynexport.exporter.bundle.conversion import convert as convert_model
    from dynexport.exporter.bundle.options import ConvertOptions

    out = Output(json_path)
    with out.progress("converting") as bar:
        how = ConvertOptions(
            keep=None if keep is None else numbers(keep, "--keep"),
            fields=settings(set_fields, "--set"),
            layer_capacity=_layer_capacity(single_graph, layer_capacity),
            progress=bar.working_on,
            **named,
        )
        done = convert_model(model, output, how)
    _show(out, done)


def _show(out: Output, done: Conversion) -> None:
    """Say what was made, in tables and in the report."""
    manifest = done.manifest
    out.facts(f"Bundle {done.output}", [*describe_bundle(manifest), *_describe_run(done)])
    if manifest.depths:
        out.table("Kept layers", *depth_table(manifest))
    if warning := not_trained(manifest, manifest.depths):
        out.warn(warning)
    for note in done.notes:
        out.warn(note)
    out.report(
        {
            **bundle_report(manifest),
            "output": str(done.output),
            "golden_rows": done.golden,
            "notes": list(done.notes),
            "peak_memory_bytes": done.peak_memory,
            "seconds": done.seconds,
        }
    )


def _layer_capacity(single_graph: bool, share: float | None) -> float | None:
    """The share of a single graph; None where none is asked for."""
    if share is not None and not single_graph:
        raise click.UsageError("--layer-capacity: expected with --single-graph, found without")
    return 1.0 if single_graph and share is None else share


def _describe_run(done: Conversion) -> list[tuple[str, str]]:
    golden = f"{done.golden} rows of PyTorch's logits" if done.golden else f"none: {done.note}"
    return [
        ("golden vectors", golden),
        ("peak memory", bytes_text(done.peak_memory)),
        ("time", f"{done.seconds:.1f} s"),
    ]
