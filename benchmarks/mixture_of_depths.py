"""Compare Mixture-of-Depths with its dense twin on a memory-bound model: random weights, about 280 M parameters.

The twin runs in a process of its own, as with ``dynexport bench --baseline``. The two run in turn, and medians of the
ratios of neighbours are reported.

Writes the figures as JSON and draws docs/images/mod-speed.svg: decoding against the share of routed layers that every
token is forced to skip, at several batches, and prompts at a realised capacity of 12.5 %. docs/benchmarks.md quotes
the figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import mod_routers
from random_llama import save_llama

from dynexport.exporter import convert
from dynexport.runtime import Bundle
from dynexport.runtime.measure.bench import Workload, benchmark
from dynexport.runtime.measure.cost import prompt_flops

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 24, 1024, 2816, 16, 4, 8192
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)
BATCHES = (1, 8, 32)
CURVE, CURVE_RATES = (1, 2, 4, 8, 16, 32), (0.5, 0.75)
PROMPTS = (512, 2048, 8192)
CAPACITY = 0.125


def save_model(directory: Path) -> None:
    """Save a model with a router in every other layer."""
    routed = range(1, LAYERS, 2)
    save_llama(
        directory,
        layers=LAYERS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocabulary=VOCABULARY,
        max_length=max(PROMPTS) + 512,
        contract={
            "strategy": "mod",
            "routed_layers": list(routed),
            "capacity": CAPACITY,
            "cache": {"capacity": 0.25},
        },
        routers=mod_routers(routed, HIDDEN),
    )


def convert_both(model: Path, directory: Path, precision: str = "fp32", *, plugins: bool = False) -> None:
    """Convert the model with and without its routers."""
    for strategy in ("mod", "dense"):
        convert(model, directory / strategy, strategy=strategy, precision=precision, plugins=plugins, golden=False)


def measure(directory: Path, threads: int, pairs: int) -> dict[str, Any]:
    """Measure decoding at every batch and skip rate, and prompts at every length."""
    found: dict[str, Any] = {"decode": {}, "prefill": {}}
    for batch in BATCHES:
        options = {"batch": batch, "prompt_tokens": 8, "new_tokens": 16, "threads": threads}
        found["decode"][batch] = _compare(directory, RATES, pairs if batch == 1 else max(3, pairs // 2), options)
        print(f"decoding, batch {batch}: {_figures(found['decode'][batch], 'speedup', 'ideal')}", flush=True)
    for tokens in PROMPTS:
        options = {"prompt_tokens": tokens, "new_tokens": 1, "threads": threads}
        done = _compare(directory, (1 - CAPACITY,), 3 if tokens < 4000 else 1, options)
        found["prefill"][tokens] = done[-1] | {"prefill_ideal": _prompt_ideal(directory / "mod", tokens)}
        print(
            f"{tokens} tokens: {_figures([found['prefill'][tokens]], 'prefill_speedup', 'prefill_ideal')}", flush=True
        )
    return found


def curve(directory: Path, batches: Sequence[int], threads: int, pairs: int) -> list[dict[str, Any]]:
    """Measure decoding at several batches with half and three quarters of the routed layers skipped."""
    rows = []
    for batch in batches:
        options = {"batch": batch, "prompt_tokens": 8, "new_tokens": 8, "threads": threads}
        for row in _compare(directory, CURVE_RATES, pairs, options)[2:]:
            rate = float(row["name"].removeprefix("skip ").removesuffix("%")) / 100
            rows.append({"batch": batch, "by_flops": _step_ideal(directory / "mod", rate)} | row)
            print(
                f"batch {batch}, {row['name']}: {row['speedup']:.2f}, ideal by bytes {row['ideal']:.2f}, "
                f"by FLOPs {rows[-1]['by_flops']:.2f}",
                flush=True,
            )
    return rows


def _step_ideal(bundle: Path, rate: float) -> float:
    """Return FLOPs of the twin's decode step / FLOPs where every token skips a share of the routed layers."""
    layer, head = Bundle.open(bundle).manifest.cost.layer_flops, 2 * HIDDEN * VOCABULARY
    return (LAYERS * layer + head) / ((LAYERS - LAYERS // 2 * rate) * layer + head)


def _compare(directory: Path, rates: Sequence[float], pairs: int, options: dict[str, int]) -> list[dict[str, Any]]:
    """Return the rows "full" (the twin), "routed" and "skip ..", as medians over pairs."""
    mod, twin = (Bundle.open(directory / name) for name in ("mod", "dense"))
    workload = Workload(skip_rates=rates, repeats=pairs, **options)
    return [
        {
            "name": result.name,
            "milliseconds": result.decode_milliseconds,
            "speedup": result.speedup,
            "ideal": result.ideal_speedup,
            "tokens_per_second": result.prefill_tokens_per_second,
            "prefill_speedup": result.prefill_speedup,
        }
        for result in benchmark(mod, workload, baseline=twin).results
    ]


def _prompt_ideal(bundle: Path, tokens: int) -> float:
    """Return FLOPs of the twin's prompt / FLOPs with the capacity's share of the tokens in every routed layer."""
    manifest = Bundle.open(bundle).manifest
    every = np.full((LAYERS, 1), tokens)
    routed = every.copy()
    routed[1::2] = int(CAPACITY * tokens)
    return prompt_flops(manifest, every) / prompt_flops(manifest, routed)


def _figures(rows: Sequence[dict[str, Any]], *names: str) -> str:
    return "; ".join(f"{row['name']} " + "/".join(f"{row[name]:.2f}" for name in names) for row in rows)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw two panels: decoding against the skip rate, prompts against their length."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "dynexport", "svg.fonttype": "none", "font.size": 10})
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained", width_ratios=[3, 2])
    for colour, (batch, done) in zip(("#0b6e99", "#c2571a", "#5b5b5b"), found["decode"].items(), strict=True):
        rows = [row for row in done if row["name"].startswith("skip")]
        rates = [float(row["name"].removeprefix("skip ").removesuffix("%")) for row in rows]
        left.plot(rates, [row["ideal"] for row in rows], "--", color=colour, linewidth=1)
        left.plot(rates, [row["speedup"] for row in rows], "o-", color=colour, label=f"batch {batch}")
    left.set_xlabel("routed layers that every token skips, % (half of the layers are routed)")
    left.set_ylabel("decode speed-up over the dense twin")
    left.legend(title="solid: measured\ndashed: ideal", frameon=False)
    names = list(found["prefill"])
    rows = list(found["prefill"].values())
    places = np.arange(len(names))
    right.bar(places - 0.2, [row["prefill_speedup"] for row in rows], 0.4, color="#0b6e99", label="measured")
    right.bar(places + 0.2, [row["prefill_ideal"] for row in rows], 0.4, color="#c9d9e1", label="ideal by FLOPs")
    right.set_xticks(places, [f"{int(name):,}" for name in names])
    right.set_xlabel("tokens of the prompt; 12.5 % run in a routed layer")
    right.set_ylabel("prefill speed-up")
    right.legend(frameon=False, loc="upper center", ncols=2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
        axes.set_ylim(0, 2.25)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Make the model once, measure, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--directory", type=Path, default=Path("build/mod-speed"), help="for model, bundles and figures"
    )
    parser.add_argument("--picture", type=Path, default=Path("build/mod-speed/mod-speed.svg"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--plugins", action="store_true", help="with dynexport's operators")
    parser.add_argument("--curve", action="store_true", help="only decoding at batches from 1 to 32")
    parser.add_argument("--rows", type=int, nargs="+", default=CURVE, help="the curve's batches")
    parser.add_argument("--draw", action="store_true", help="draw again from figures that are there")
    arguments = parser.parse_args()
    model = arguments.directory / "model"
    directory = arguments.directory / f"{arguments.precision}{'-plugins' if arguments.plugins else ''}"
    figures = directory / "figures.json"
    if not arguments.draw:
        if not (model / "config.json").exists():
            save_model(model)
        if not (directory / "dense").exists():
            convert_both(model, directory, arguments.precision, plugins=arguments.plugins)
    if arguments.curve:
        (directory / "curve.json").write_text(
            json.dumps(curve(directory, arguments.rows, arguments.threads, arguments.pairs), indent=1)
        )
        return
    if not arguments.draw:
        figures.write_text(json.dumps(measure(directory, arguments.threads, arguments.pairs), indent=1))
    draw(json.loads(figures.read_text()), arguments.picture)


if __name__ == "__main__":
    main()
