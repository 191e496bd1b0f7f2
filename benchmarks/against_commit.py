"""Decode and prefill of every strategy, against another commit of dynexport, in turn on one machine.

Each commit is named by the Python that it is installed for, with its own bundles:

    python benchmarks/against_commit.py OLD/.venv/bin/python NEW/.venv/bin/python --repeats 7

Random llamas of SmolLM2-135M's sizes. Each repetition runs ``dynexport bench`` of the one, then of the other, in
processes of their own. Prints the medians in milliseconds and the median of the ratios of neighbours, new time / old
time. docs/benchmarks.md quotes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import mod_routers, radial_router
from random_llama import save_llama

LAYERS = 30
SIZES = {"layers": LAYERS, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152}
ROUTED = range(1, LAYERS, 2)
# Name -> the contract, routers, options of convert, and the rows of the table that are compared.
WAYS: dict[str, tuple[dict[str, Any], dict[str, tuple[int, ...]], list[str]]] = {
    "dense": ({"strategy": "dense"}, {}, []),
    "unified-skip, ratio 2": ({"strategy": "unified-skip", "speedups": [2.0]}, {}, []),
    "unified-skip, int4, ratio 2": ({"strategy": "unified-skip", "speedups": [2.0]}, {}, ["--precision", "int4"]),
    "mod": (
        {"strategy": "mod", "routed_layers": list(ROUTED), "capacity": 0.5},
        mod_routers(ROUTED, SIZES["hidden"]),
        [],
    ),
    "radial": (
        {"strategy": "radial", "max_steps": LAYERS, "router": {"hidden": 64}},
        radial_router(LAYERS, SIZES["hidden"], 64),
        [],
    ),
}


def run(python: Path, *arguments: object) -> str:
    """Return what a ``dynexport`` command of one of the two prints."""
    command = [str(python), "-m", "dynexport", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measured(python: Path, bundle: Path, batch: int, threads: int) -> tuple[float, float]:
    """Milliseconds of the prompt and of a decode step: the last row of bench's table that routers or a ratio decide."""
    sizes = ("--batch", batch, "--prompt-tokens", 128, "--new-tokens", 24, "--repeats", 3, "--threads", threads)
    report = json.loads(run(python, "bench", bundle, *sizes, "--json", "-"))
    result = report["results"][-1]
    return 1e3 * batch * 128 / result["prefill_tokens_per_second"], result["decode_milliseconds"]


def compare(pythons: Sequence[Path], bundles: Sequence[Path], repeats: int, batch: int, threads: int) -> str:
    """Return a row of the table: medians of the old and the new one, and of the ratios of neighbours."""
    found: list[list[tuple[float, float]]] = [[], []]
    for _ in range(repeats):
        for python, bundle, own in zip(pythons, bundles, found, strict=True):
            own.append(measured(python, bundle, batch, threads))
    cells = []
    for part in (0, 1):
        old, new = ([times[part] for times in own] for own in found)
        ratio = statistics.median(b / a for a, b in zip(old, new, strict=True))
        cells.append(f"{statistics.median(old):.2f} | {statistics.median(new):.2f} | {ratio:.3f}")
    return " | ".join(cells)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    pythons = [options.old.absolute(), options.new.absolute()]
    print("| | prefill old | new | ratio | decode old | new | ratio |")
    with tempfile.TemporaryDirectory() as directory:
        for number, (name, (contract, routers, more)) in enumerate(WAYS.items()):
            home = Path(directory) / str(number)
            save_llama(home / "model", **SIZES, max_length=512, contract=contract, routers=routers)
            bundles = [home / "old", home / "new"]
            for python, bundle in zip(pythons, bundles, strict=True):
                run(python, "convert", home / "model", "-o", bundle, "--no-golden", *more)
            row = compare(pythons, bundles, options.repeats, options.batch, options.threads)
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
