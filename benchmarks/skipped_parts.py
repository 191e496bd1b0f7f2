"""Compare a FlexiDepth-shaped model with its dense twin: random weights, about 290 M parameters, decoding at batch 1.

In the second half of the layers a router decides about attention's queries and the MLP; keys and values are always
computed, and a small adapter takes the MLP's place. The twin runs in a process of its own; medians of the ratios of
neighbours are reported, beside the ratio of the bytes that must be read. docs/benchmarks.md quotes the figures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from checkpoints import Shapes
from mixture_of_depths import HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, VOCABULARY
from random_llama import save_llama

from dynexport.exporter import convert
from dynexport.runtime import Bundle
from dynexport.runtime.measure.bench import Workload, benchmark

REDUCTION = 16
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


def save_model(directory: Path) -> None:
    """Save a model whose second half of layers has routers and adapters."""
    routed = range(LAYERS // 2, LAYERS)
    router, adapter = HIDDEN // REDUCTION, INTERMEDIATE // REDUCTION
    added: Shapes = {}
    for layer in routed:
        name = f"model.layers.{layer}.mod_"
        added |= {f"{name}router.fc1.weight": (router, HIDDEN), f"{name}router.norm.weight": (router,)}
        added |= {f"{name}router.fc2.weight": (1, router), f"{name}adapter.down_proj.weight": (HIDDEN, adapter)}
        added |= {f"{name}adapter.{part}_proj.weight": (adapter, HIDDEN) for part in ("gate", "up")}
    save_llama(
        directory,
        layers=LAYERS,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocabulary=VOCABULARY,
        max_length=1024,
        contract={
            "strategy": "mod",
            "routed_layers": list(routed),
            "router_input": "normed",
            "router": {"kind": "bottleneck"},
            "skipped_kv": "own",
            "skip_branch": "adapter",
            "gate": "split",
        },
        routers=added,
    )


def main() -> None:
    """Make the model once, convert it with and without routers, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("build/skipped-parts"), help="for model and bundles")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--plugins", action="store_true", help="with dynexport's operators")
    arguments = parser.parse_args()
    model = arguments.directory / "model"
    directory = arguments.directory / f"{arguments.precision}{'-plugins' if arguments.plugins else ''}"
    if not (model / "config.json").exists():
        save_model(model)
    for strategy in ("mod", "dense"):
        if not (directory / strategy).exists():
            convert(
                model,
                directory / strategy,
                strategy=strategy,
                precision=arguments.precision,
                plugins=arguments.plugins,
                golden=False,
            )
    mod, twin = (Bundle.open(directory / name) for name in ("mod", "dense"))
    workload = Workload(
        skip_rates=RATES,
        repeats=arguments.pairs,
        prompt_tokens=8,
        new_tokens=arguments.new_tokens,
        threads=arguments.threads,
    )
    for row in benchmark(mod, workload, baseline=twin).results:
        share = row.speedup / row.ideal_speedup if row.speedup and row.ideal_speedup else float("nan")
        print(
            f"{row.name}: {row.decode_milliseconds:.2f} ms, {row.speedup:.3f} of the twin, ideal "
            f"{row.ideal_speedup:.3f}, efficiency {share:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
