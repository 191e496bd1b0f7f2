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
    weights_option,
)
from dynexport.exporter.cli.bench_drafts import GROUPS, bench_drafts
from dynexport.exporter.cli.describe import start_text
from dynexport.exporter.cli.output import Output, bytes_text, json_option
from dynexport.exporter.cli.speculation_options import asked_speculation, speculation_options
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.manifest import FULL, PathRouting
from dynexport.runtime.text.text import Text

if TYPE_CHECKING:
    from dynexport.runtime.measure.bench import Benchmark, Result

_SHOWN_OPERATORS = 6
_DECODE = ["", "layers", "ms", "least", "speed-up", "ideal", "efficiency"]
_MEMORY = ["", "MB a step", "GB/s", "memory GB/s", "ideal ms", "fits the cache", "others"]
# Share of the machine above which other processes are named as a disturbance.
_DISTURBED = 0.05


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
    weights_option,
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
  dynexport bench radial-model --baseline dense-model --hops 4 --hops 8
  dynexport bench smollm2 --speculate --text report.txt
  dynexport bench smollm2 --speculate 4 --draft 2 --batch 8 --text report.txt"""
)
@bundle_argument
@_workload_options
@speculation_options
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
    speculate: str | None,
    draft: str | None,
    **workload: Any,
) -> None:
    """Measure BUNDLE at full depth and with skipped layers, in turn, and compare with the ideal.

    With --speculate, measure decoding with drafts beside decoding without, at one depth.

    \b
    ms          median, ± half of the interquartile range; least: the shortest
    speed-up    full depth's time / this time: median over repetitions, ± half of the interquartile range
    ideal       decode: bytes read (weights and KV cache) at full depth / bytes read by these steps;
                prefill: FLOPs of the prompt at full depth / FLOPs of the layers that ran
    efficiency  measured speed-up / ideal
    GB/s        bytes that a step reads / its time; memory GB/s: read bandwidth measured at that size
    ideal ms    bytes that a step reads / read bandwidth
    others      share of the machine that other processes took
    gain        with drafts: time of the tokens without them / with them; its ideal: steps without / with them
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
        most = workload["batch"] * workload["prompt_tokens"] * (1 if speculate is None else GROUPS)
        text = Text.of_bundle(opened).encode(read_text(text_path, most))
    depth = opened.manifest.full if workload["depth"] is None else opened.depth(workload["depth"])
    if (speculation := asked_speculation(opened, speculate, draft, depth)) is not None:
        if baseline is not None or workload["skip_rates"] or workload["hops"]:
            raise click.UsageError("--speculate: expected without --baseline, --skip-rate and --hops, found with one")
        bench_drafts(out, opened, text, speculation, {**workload, "depth": depth})
        return
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
    if bundle.manifest.routing is not None or any(each.prefill_ideal_speedup != 1 for each in results):
        columns = ["", "tok/s", "ms", "least", "speed-up", "ideal"]
        out.table(f"{measured.bundle}: the prompt", columns, [_prompt(result) for result in results])
    else:
        (_, *figures) = _prompt(results[0])
        out.say("the prompt: {} tok/s, {} ms, least {}".format(*figures))
    out.table(f"{measured.bundle}: decode steps", _DECODE, [_decoding(result, layers) for result in results])
    if measured.spinning:
        out.table(f"{measured.bundle}: memory", _MEMORY, [_memory(result) for result in results])
    if measured.engine_share is not None:
        shares = [f"{name} {share:.0%}" for name, share in list(measured.operators.items())[:_SHOWN_OPERATORS]]
        out.say(f"a decode step: {measured.engine_share:.0%} inside the engine; of that " + ", ".join(shares))


def _warn(out: Output, measured: Benchmark) -> None:
    """Print the baseline, what disturbed, and warnings about unstable ratios and tokens that were turned away."""
    others = measured.results[1:]
    if measured.baseline != measured.bundle:
        out.say(f"{FULL}: {measured.baseline}, in its own process")
    if len(set(measured.spinning.values())) == 2:
        awake = next(path for path, spins in measured.spinning.items() if spins)
        out.say(f"threads of {awake} wait awake for the next step; those of the other bundle, of several graphs, sleep")
    if cached := [f"{each.name} ({bytes_text(each.bytes_per_step)})" for each in measured.results if each.fits_cache]:
        out.say(
            f"{', '.join(cached)}: a step's bytes fit the last-level cache of {(measured.last_level_cache or 0) >> 20} "
            "MiB, which is read faster than memory: beside a full depth that does not fit, ideal and efficiency say "
            "little"
        )
    _say_start(out, measured)
    _say_other_work(out, measured)
    if unsteady := [result.name for result in others if not result.steady]:
        why = "their quartiles lie more than a tenth apart" if measured.repeats >= 3 else "fewer than 3 repetitions"
        out.warn(f"{', '.join(unsteady)}: ratios that may not repeat: {why}; raise --repeats, on a machine at rest")
    for result in others:
        if result.turned_away:
            out.warn(f"{result.name}: tokens were turned away {result.turned_away} times because a layer was full")


def _say_start(out: Output, measured: Benchmark) -> None:
    if measured.startup is not None:
        out.say(f"a start in a process of its own, {measured.weights} weights: {start_text(measured.startup)}")


def _say_other_work(out: Output, measured: Benchmark) -> None:
    """Print the share of the machine that other processes took; a warning where it disturbed a mode."""
    if measured.others_share is None:
        out.say("other processes: their share of the machine is not known on this system")
        return
    out.say(f"other processes took {measured.others_share:.1%} of the machine")
    shares = [(each.name, each.others_share) for each in measured.results if each.others_share is not None]
    if disturbed := [f"{name} ({share:.0%})" for name, share in shares if share > _DISTURBED]:
        out.warn(f"{', '.join(disturbed)}: other processes took more than {_DISTURBED:.0%} of the machine: repeat it")


def _prompt(result: Result) -> list[str]:
    return [
        result.name,
        f"{result.prefill_tokens_per_second:.0f}",
        _milliseconds(result.prefill_milliseconds, result.prefill_quartiles_milliseconds),
        f"{result.prefill_least_milliseconds:.2f}",
        _speedup(result.prefill_speedup, result.prefill_speedup_quartiles),
        f"{result.prefill_ideal_speedup:.2f}x",
    ]


def _decoding(result: Result, layers: int) -> list[str]:
    return [
        result.name,
        f"{result.layers:.3g} of {layers}",
        _milliseconds(result.decode_milliseconds, result.decode_quartiles_milliseconds),
        f"{result.decode_least_milliseconds:.2f}",
        _speedup(result.speedup, result.speedup_quartiles),
        f"{result.ideal_speedup:.2f}x",
        f"{result.efficiency:.2f}",
    ]


def _memory(result: Result) -> list[str]:
    return [
        result.name,
        f"{result.bytes_per_step / 1e6:.1f}",
        f"{result.gigabytes_per_second:.1f}",
        f"{result.bandwidth_gigabytes_per_second:.1f}",
        f"{result.ideal_milliseconds:.2f}",
        {None: "not known", True: "yes", False: "no"}[result.fits_cache],
        "not known" if result.others_share is None else f"{result.others_share:.1%}",
    ]


def _milliseconds(median: float, quartiles: tuple[float, float]) -> str:
    return _with_spread(f"{median:.2f}", median, quartiles)


def _speedup(median: float, quartiles: tuple[float, float]) -> str:
    return _with_spread(f"{median:.2f}x", median, quartiles)


def _with_spread(text: str, median: float, quartiles: tuple[float, float]) -> str:
    """Return a text with half of the interquartile range in percent, if that is not 0."""
    lower, upper = quartiles
    return text if lower == upper else f"{text} ±{(upper - lower) / 2 / median:.0%}"
