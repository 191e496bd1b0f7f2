"""``dynexport convert``: convert a checkpoint to a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import numbers, options, read_text, settings
from dynexport.exporter.cli.describe import bundle_report, depth_table, describe_bundle, not_trained
from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.runtime.bundle.contract import STRATEGY_NAMES

if TYPE_CHECKING:
    from dynexport.exporter.bundle.conversion import Conversion


# Fields of the routing contract.
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
        help="Rule that selects the kept layers for a ratio.",
    ),
    click.option("--keep", metavar="0,2,..", help="Kept layers, instead of a ratio."),
    click.option(
        "--exit",
        "exits",
        type=int,
        multiple=True,
        help="early-exit: after how many layers tokens may leave, as LayerSkip's exit_layer; prompts leave there too, "
        "unless --set prompt=full. May be given several times.",
    ),
    click.option(
        "--set",
        "set_fields",
        metavar="FIELD=VALUE",
        multiple=True,
        help="A field of the routing contract, as JSON or text; a.b sets field b of a. May be given several times.",
    ),
    click.option("--loops", type=int, help="Of a looped model, the most loops of a token: --set loops=LOOPS."),
    click.option(
        "--import",
        "importer",
        metavar="NAME",
        help="Read a checkpoint that other routing code has written; NAME is astramind, flexidepth, skipgpt, d-llm, "
        "mindskip or dlo.  [default: the one that knows its config and tensors]",
    ),
    click.option(
        "--adapter",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Merge a LoRA adapter of the peft library into the weights; a routing contract in its config.json counts.",
    ),
)
# The engine that graphs are written for.
_target_options = options(
    click.option(
        "--precision",
        "--dtype",
        "precision",
        type=click.Choice(["auto", "fp32", "fp16", "bf16", "int8", "int4"]),
        default="auto",
        show_default=True,
        help="Type of the stored weights: auto keeps the quantised blocks of a .gguf file as they are, with ONNX "
        "Runtime, and with --plugins 16-bit weights too; else it is fp32. bf16 needs --plugins or TensorRT.",
    ),
    click.option(
        "--target",
        type=click.Choice(["onnxruntime", "tensorrt"]),
        default="onnxruntime",
        show_default=True,
        help="Engine that the graphs are made for; ONNX Runtime runs both kinds.",
    ),
    click.option(
        "--kv-cache-dtype",
        type=click.Choice(["auto", "fp32", "fp16", "int8"]),
        default="auto",
        show_default=True,
        help="Type of the stored keys and values: auto is that of hidden_states; for ONNX Runtime also fp32, fp16 "
        "(with --plugins, in half of the memory), or int8 in a quarter of it.",
    ),
    click.option(
        "--kv-cache-text",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="UTF-8 text that the scales of int8 caches are measured on: a file, a pipe, or '-'.  [default: a text "
        "that comes with dynexport]",
    ),
    click.option(
        "--quantiser",
        type=click.Choice(["auto", "nearest", "search", "gptq"]),
        default="auto",
        show_default=True,
        help="How int4 weights are rounded, for ONNX Runtime: to the nearest symmetric integers; by search for each "
        "block's scale and zero point (auto); or by gptq, which measures inputs on a text with PyTorch, takes minutes "
        "for large models, and loses least.",
    ),
    click.option(
        "--quantiser-text",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="UTF-8 text that gptq measures inputs on: a file, a pipe, or '-'.  [default: a text that comes with "
        "dynexport]",
    ),
    click.option(
        "--head-bits",
        type=click.Choice(["8", "4"]),
        help="int4, ONNX Runtime: bits of the head and of embedding tables.  [default: 8]",
    ),
    click.option(
        "--sensitive",
        type=float,
        metavar="SHARE",
        help="gptq: share of the layers' weights that stay in 8 bits: the matrices whose products on the text would "
        "lose most.  [default: 0]",
    ),
    click.option("--max-batch", type=int, help="TensorRT: largest batch of the engines.  [default: 8]"),
    click.option(
        "--max-prompt",
        type=int,
        help="TensorRT: largest prefill chunk of the engines, in tokens.  [default: the context, up to 1024]",
    ),
    click.option(
        "--plugins",
        is_flag=True,
        help="Use dynexport's custom operators where they help: for ONNX Runtime, products over blocks and 16-bit "
        "weights, and attention, on CPUs; for TensorRT, its plugins; with radial also a graph that decodes in one "
        "call.",
    ),
)
# Content and form of the bundle.
_form_options = options(
    click.option(
        "--max-length",
        type=int,
        help="Context length in tokens.  [default: the model's; with longrope, the original length]",
    ),
    click.option(
        "--static",
        is_flag=True,
        help="Write one graph per ratio with only its kept layers, instead of one graph with conditions.",
    ),
    click.option(
        "--single-graph",
        is_flag=True,
        help="radial: write one graph of all hops without conditions, instead of a set that the runtime calls in turn.",
    ),
    click.option(
        "--layer-capacity",
        type=float,
        metavar="SHARE",
        help="With --single-graph: a layer's capacity as a share of a call's tokens, above 0 and up to 1; tokens "
        "beyond it are turned away and counted.  [default: 1]",
    ),
    click.option(
        "--golden/--no-golden",
        default=True,
        show_default=True,
        help="Store PyTorch's logits of a few rows in the bundle, to verify it without PyTorch.",
    ),
    click.option(
        "--tokenizer",
        type=click.Path(path_type=Path),
        help="A tokenizer.json, copied unchanged, or a directory with a tokenizer, instead of the model's.",
    ),
)


@click.command(
    epilog="""\b
Examples:
  dynexport convert ./SmolLM2-135M-Instruct --strategy unified-skip --speedup 2 --speedup 3 -o smollm2
  dynexport convert model.gguf --strategy dense -o model
  dynexport convert ./model --strategy dense --precision int4 -o model-int4
  dynexport convert ./model --precision int4 --quantiser gptq --quantiser-text book.txt -o model-int4
  dynexport convert ./model --strategy unified-skip --keep 0,2,4,7 -o model-skip
  dynexport convert ./layerskip-llama2-7B --strategy early-exit --exit 8 -o layerskip
  dynexport convert ./mod-model --set decision.threshold=0.4 --set cache.capacity=0.25 -o mod
  dynexport convert ./mod-model --set 'thresholds={"1": 0.41, "3": 0.52}' -o mod
  dynexport convert ./trained --import astramind -o mod
  dynexport convert ./model --adapter ./lora -o adapted
  dynexport convert ./model --target tensorrt --precision fp16 --max-length 4096 --max-batch 4 -o engine-ready
  dynexport convert model.gguf --kv-cache-dtype int8 --kv-cache-text book.txt -o model-kv8
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
    exits: tuple[int, ...],
    set_fields: tuple[str, ...],
    loops: int | None,
    single_graph: bool,
    layer_capacity: float | None,
    kv_cache_text: Path | None,
    quantiser_text: Path | None,
    head_bits: str | None,
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
            fields=({"prompt": "exit", "exits": sorted(exits)} if exits else {})
            | settings((*set_fields, *([] if loops is None else [f"loops={loops}"])), "--set"),
            layer_capacity=_layer_capacity(single_graph, layer_capacity),
            kv_cache_text=_text(kv_cache_text),
            quantiser_text=_text(quantiser_text),
            head_bits=None if head_bits is None else int(head_bits),
            progress=bar.working_on,
            **named,
        )
        done = convert_model(model, output, how)
    _show(out, done)


def _text(path: Path | None) -> str | None:
    from dynexport.exporter.bundle.options import CALIBRATION_TOKENS

    return None if path is None else read_text(path, CALIBRATION_TOKENS)


def _show(out: Output, done: Conversion) -> None:
    """Show the bundle in tables and in the report."""
    manifest = done.manifest
    weights = [("weights" if i == 0 else "", str(each)) for i, each in enumerate(done.matrices)]
    out.facts(f"Bundle {done.output}", [*describe_bundle(manifest), *weights, *_describe_run(done)])
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
            "weights": [asdict(each) for each in done.matrices],
            "peak_memory_bytes": done.peak_memory,
            "seconds": done.seconds,
        }
    )


def _layer_capacity(single_graph: bool, share: float | None) -> float | None:
    """Return the layer capacity of a single graph; None without --single-graph."""
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
