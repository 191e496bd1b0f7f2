"""``dynexport bench``: how fast a bundle runs, and how near that is to the ideal."""

from __future__ import annotations

from pathlib import Path

import click

from dynexport.exporter.cli.arguments import bundle_argument, threads_option
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle import Bundle

_SHOWN_OPERATORS = 6


@click.command(
    epilog="""\b
Examples:
  dynexport bench smollm2
  dynexport bench smollm2 --prompt-tokens 512 --new-tokens 64 --batch 4 --speedup 2 --threads 2 --json bench.json"""
)
@bundle_argument
@click.option("--prompt-tokens", type=int, default=256, show_default=True, help="Length of the prompt.")
@click.option("--new-tokens", type=int, default=32, show_default=True, help="Decode steps measured per repetition.")
@click.option("--batch", type=int, default=1, show_default=True, help="Rows.")
@click.option("--speedup", help="Measure this ratio only.  [default: all that the bundle declares]")
@click.option("--repeats", type=int, default=7, show_default=True, help="Times that all are measured in turn.")
@threads_option
@json_option
def bench(
    bundle: Path,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    speedup: str | None,
    repeats: int,
    threads: int,
    json_path: str | None,
) -> None:
    """Measure BUNDLE at full depth and at every ratio, in turn, and compare with the bytes that must be read.

    \b
    ideal       bytes read at full depth / bytes read at the ratio (weights and K/V cache)
    efficiency  measured speed-up / ideal
    """
    from dynexport.runtime.bench import benchmark

    out = Output(json_path)
    opened = Bundle.open(bundle)
    with out.progress("measuring") as bar:
        measured = benchmark(
            opened,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            speedup=speedup,
            repeats=repeats,
            threads=threads,
            progress=bar.update,
        )
    machine = measured.machine
    out.say(f"{machine.cpu}, {threads} of {machine.cores} cores, ONNX Runtime {machine.onnxruntime}")
    out.say(
        f"{measured.precision}, batch {batch}, {prompt_tokens} prompt tokens, {new_tokens} decode steps, "
        f"medians of {repeats} repetitions after a warm-up, every ratio in turn"
    )
    rows = [
        [
            result.name,
            str(result.layers),
            f"{result.prefill_tokens_per_second:.0f}",
            f"{result.decode_milliseconds:.2f}",
            f"{result.speedup:.2f}x",
            f"{result.ideal_speedup:.2f}x",
            f"{result.efficiency:.2f}",
            f"{result.gigabytes_per_second:.1f}",
        ]
        for result in measured.results
    ]
    columns = ["", "layers", "prefill tok/s", "decode ms", "speed-up", "ideal", "efficiency", "GB/s"]
    out.table(f"{bundle}", columns, rows)
    shares = [f"{name} {share:.0%}" for name, share in list(measured.operators.items())[:_SHOWN_OPERATORS]]
    out.say(f"a full-depth step: {measured.engine_share:.0%} inside the engine; of that " + ", ".join(shares))
    out.report(measured.model_dump())
