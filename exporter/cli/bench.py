"""``dynexport bench``: measure the speed of a bundle and compare it with the ideal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynexport.exporter.cli.arguments import (
    backend_option,
    bundle_argument,
    depth_option,
    options,
    read_text,
    threads_option,
    trust_option,
)
from dynexport.exporter.cli.output import Output, json_option
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import FULL, PathRouting
from dynexport.runtime.text.text import Text

if TYPE_CHECKING:
    from dynexport.runtime.measure.bench import Benchmark, Result

_SHOWN_OPERATORS = 6
_DECODE = ["decode ms", "speed-up", "ideal", "efficiency", "GB/s"]


# The fields of a ``Workload`` except the text.
_workload_options = options(
    click.option("--prompt-tokens", type=int, default=256, show_default=True, help="Length of each prompt."),
    click.option("--new-tokens", type=int, default=32, show_default=True, help="Timed decode steps per repetition."),
    click.option("--batch", type=int, default=1, show_default=True, help="Prompts that run together."),
    depth_option("Measure this ratio only.  [default: every ratio of the bundle]"),
    click.option(
        "--skip-rate",
        "skip_rates",
        type=float,
        multiple=True,
        help="With routed layers: also measure runs in which every token skips this share of them; may be given "
        "several times.",
    ),
    click.option(
        "--hops",
        type=int,
        multiple=True,
        help="With paths through a pool: also measure paths of this many layers; may be given several times.",
    ),
    click.option(
        "--repeats",
        type=int,
        default=7,
        show_default=True,
        help="Repetitions, each measuring everything in turn; at least 3 show whether a ratio is stable.",
    ),
    backend_option,
    threads_option,
)


@click.command(
    epilog="""\b
Examples:
  dynexport bench smollm2
  dynexport bench smollm2 --speedup 2 --threads 2 --batch 4
  dynexport bench smollm2 --prompt-tokens 512 --new-tokens 64 --repeats 15 --json bench.json
  dynexport bench mod-model --skip-rate 0.5 --skip-rate 1
  dynexport bench mod-model --baseline dense-model --text book.txt
  dynexport bench radial-model --baseline dense-model --hops 4 --hops 8"""
)
@bundle_argument
@_workload_options
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="A bundle of the same model, precision and target without routers, to measure full depth in its own process.  "
    "[default: BUNDLE with every layer forced to run]",
)
@click.option(
    "--text", "text_path", type=click.Path(path_type=Path), help="A UTF-8 text for prompts.  [default: random tokens]"
)
@trust_option
@json_option
def bench(
    bundle: Path,
    baseline: Path | None,
    text_path: Path | None,
    trust_engines: bool,
    json_path: str | None,
    **workload: Any,
) -> None:
    """Measure BUNDLE at full depth and with skipped layers, in turn, and compare with the ideal.

    \b
    speed-up    full depth's time / this time: median over repetitions, ± half of the interquartile range
    ideal       decode: bytes read (weights and KV cache) at full depth / bytes read by these steps;
                prefill: FLOPs of the prompt at full depth / FLOPs of the layers that ran
    efficiency  measured speed-up / ideal
    """
    from dynexport.runtime.measure.bench import Workload, benchmark

    out = Output(json_path)
    opened = Bundle.open(bundle, trust_engines=trust_engines)
    if isinstance(opened.manifest.routing, PathRouting) and workload["depth"] not in (None, "1", FULL):
        raise click.UsageError(
            f"--depth: expected 1 or {FULL}, as routers decide here, found {workload['depth']:.40}; --hops N makes "
            "every token take a path of N layers"
        )
    text = None
    if text_path is not None:
        text = Text.of_bundle(opened).encode(read_text(text_path, workload["batch"] * workload["prompt_tokens"]))
    with out.progress("measuring") as bar:
        measured = benchmark(
            opened,
            Workload(text=text, **workload),
            baseline=None if baseline is None else Bundle.open(baseline, trust_engines=trust_engines),
            progress=bar.update,
        )
    _show(out, opened, measured)
    _warn(out, measured)
    out.report(measured.model_dump())


def _show(out: Output, bundle: Bundle, measured: Benchmark) -> None:
    """Print the machine, the settings and the result tables."""
    machine = measured.machine
    out.say(f"{machine.cpu}, {measured.threads} of {machine.cores} cores, {measured.engine}")
    out.say(
        f"{measured.precision}, batch {measured.batch}, {measured.prompt_tokens} prompt tokens, {measured.new_tokens} "
        f"decode steps, medians of {measured.repeats} repetitions after a warm-up, all in turn"
    )
    results, layers = measured.results, bundle.manifest.model.layers
    if bundle.manifest.routing is None:
        rows = [_decoding(result, layers, f"{result.prefill_tokens_per_second:.0f}") for result in results]
        out.table(measured.bundle, ["", "layers", "prefill tok/s", *_DECODE], rows)
    else:
        columns = ["", "tok/s", "speed-up", "ideal"]
        out.table(f"{measured.bundle}: the prompt", columns, [_prompt(result) for result in results])
        rows = [_decoding(result, layers) for result in results]
        out.table(f"{measured.bundle}: decoding", ["", "layers", *_DECODE], rows)
    if measured.engine_share is not None:
        shares = [f"{name} {share:.0%}" for name, share in list(measured.operators.items())[:_SHOWN_OPERATORS]]
        out.say(f"a decode step: {measured.engine_share:.0%} inside the engine; of that " + ", ".join(shares))


def _warn(out: Output, measured: Benchmark) -> None:
    """Print the baseline and warnings about unstable ratios and tokens that were turned away."""
    others = measured.results[1:]
    if measured.baseline != measured.bundle:
        out.say(f"{FULL}: {measured.baseline}, in its own process")
    if unsteady := [result.name for result in others if not result.steady]:
        why = "their quartiles lie more than a tenth apart" if measured.repeats >= 3 else "fewer than 3 repetitions"
        out.warn(f"{', '.join(unsteady)}: ratios that may not repeat: {why}; raise --repeats, on a machine at rest")
    for result in others:
        if result.turned_away:
            out.warn(f"{result.name}: tokens were turned away {result.turned_away} times because a layer was full")


def _prompt(result: Result) -> list[str]:
    return [
        result.name,
        f"{result.prefill_tokens_per_second:.0f}",
        _speedup(result.prefill_speedup, result.prefill_speedup_quartiles),
        f"{result.prefill_ideal_speedup:.2f}x",
    ]


def _decoding(result: Result, layers: int, *more: str) -> list[str]:
    return [
        result.name,
        f"{result.layers:.3g} of {layers}",
        *more,
        f"{result.decode_milliseconds:.2f}",
        _speedup(result.speedup, result.speedup_quartiles),
        f"{result.ideal_speedup:.2f}x",
        f"{result.efficiency:.2f}",
        f"{result.gigabytes_per_second:.1f}",
    ]


def _speedup(median: float, quartiles: tuple[float, float]) -> str:
    """Return a ratio as text, with half of its interquartile range in percent if that is not 0."""
    lower, upper = quartiles
    return f"{median:.2f}x" if lower == upper else f"{median:.2f}x ±{(upper - lower) / 2 / median:.0%}"
