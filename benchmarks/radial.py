"""Measure Radial Networks on a memory-bound model: random weights, about 280 M parameters, a pool of 32 layers.

- decoding against the number of hops that every token is forced to take, and against the dense twin, in several forms:
  fp32 and int4, hop by hop, and with dynexport's operators, by which a step is one call;
- with --all, the same path in pools of different sizes, and memory, loading time and size on disk beside the twin.

Every measurement runs in a process of its own; compared ones run in turn, and medians are reported. Writes the figures
as JSON; docs/benchmarks.md quotes them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import radial_router
from random_llama import save_llama

from dynexport.exporter import convert
from dynexport.runtime import Bundle

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 32, 896, 2432, 14, 2, 8192
POOLS = (8, 16, 32)
HOPS = (8, 16, 24)
ROUTER = 64
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp32-plugins": {"precision": "fp32", "plugins": True},
    "int4": {"precision": "int4"},
    "int4-plugins": {"precision": "int4", "plugins": True},
}
_STEPS_IN_TURN = 63


def save_model(directory: Path, layers: int) -> None:
    """Save a model whose paths may have 32 hops, whatever the size of its pool."""
    save_llama(
        directory,
        layers=layers,
        hidden=HIDDEN,
        intermediate=INTERMEDIATE,
        heads=HEADS,
        kv_heads=KV_HEADS,
        vocabulary=VOCABULARY,
        max_length=2048,
        contract={"strategy": "radial", "max_steps": LAYERS, "router": {"hidden": ROUTER}},
        routers=radial_router(layers, HIDDEN, ROUTER),
    )


def prepare(directory: Path, forms: Sequence[str], *, pools: bool) -> None:
    """Make checkpoints, a bundle and its dense twin in every form, and a bundle of every pool, unless they exist."""
    for layers in POOLS if pools else (LAYERS,):
        model = directory / f"model-{layers}"
        if not (model / "config.json").exists():
            save_model(model, layers)
        if pools:
            _convert(model, directory / f"pool-{layers}")
    for form in forms:
        _convert(directory / f"model-{LAYERS}", directory / f"radial-{form}", **FORMS[form])
        _convert(directory / f"model-{LAYERS}", directory / f"dense-{form}", strategy="dense", **FORMS[form])


def _convert(model: Path, bundle: Path, **options: Any) -> None:
    if not bundle.exists():
        convert(model, bundle, golden=False, **options)


def measure(directory: Path, forms: Sequence[str], threads: int, pairs: int) -> dict[str, Any]:
    """Return the speed of every form at every depth."""
    rounds: dict[str, list[dict[str, Any]]] = {form: [] for form in forms}
    for _ in range(pairs):
        for form, found in rounds.items():
            job = {"hops": HOPS, "threads": threads}
            twin = _run(directory / f"dense-{form}", {"threads": threads})
            found.append({"dense": twin, "radial": _run(directory / f"radial-{form}", job)})
    return {form: _depths(found) for form, found in rounds.items()}


def measure_rest(directory: Path, forms: Sequence[str], threads: int, pairs: int) -> dict[str, Any]:
    """Return the time in pools of different sizes, and memory and loading of every form."""
    pools = [_work_in_process(directory, {"pools": True, "threads": threads}) for _ in range(pairs)]
    names = [f"{kind}-{form}" for form in forms for kind in ("dense", "radial")]
    return {
        "pools": {str(layers): statistics.median(row[str(layers)] for row in pools) for layers in POOLS},
        "memory": {name: _memory(directory / name, threads, pairs) for name in names},
    }


def _depths(rounds: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Compare each number of hops with the whole pool in order, in one process, and with the dense twin."""
    rows = []
    for place in range(len(rounds[0]["radial"])):
        ways = [found["radial"][place] for found in rounds]
        twins = [found["dense"][0] for found in rounds]
        rows.append(
            {
                "layers": statistics.median(way["layers"] for way in ways),
                "milliseconds": statistics.median(way["decode_milliseconds"] for way in ways),
                "speedup": statistics.median(way["speedup"] for way in ways),
                "ideal": statistics.median(way["ideal_speedup"] for way in ways),
                "efficiency": statistics.median(way["efficiency"] for way in ways),
                "against_twin": statistics.median(
                    twin["decode_milliseconds"] / way["decode_milliseconds"]
                    for twin, way in zip(twins, ways, strict=True)
                ),
                "twin_ideal": statistics.median(
                    _bytes(twin) / _bytes(way) for twin, way in zip(twins, ways, strict=True)
                ),
            }
        )
    return rows


def _bytes(result: dict[str, Any]) -> float:
    return float(result["gigabytes_per_second"] * result["decode_milliseconds"])


def _memory(bundle: Path, threads: int, repeats: int) -> dict[str, float]:
    """Return resident megabytes after loading and after running every layer, seconds to load, and file sizes."""
    found = [_work_in_process(bundle, {"memory": True, "threads": threads}) for _ in range(repeats)]
    sizes = {
        "weights_mb": (bundle / "model.data").stat().st_size / 1e6,
        "bundle_mb": sum(path.stat().st_size for path in bundle.iterdir()) / 1e6,
    }
    return {name: statistics.median(row[name] for row in found) for name in found[0]} | sizes


def _run(bundle: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Run ``benchmark`` in a process of its own."""
    results: list[dict[str, Any]] = _work_in_process(bundle, job)
    return results


def _work_in_process(bundle: Path, job: dict[str, Any]) -> Any:
    words = [sys.executable, __file__, "--worker", json.dumps([str(bundle), job])]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def _work(told: str) -> Any:
    path, job = json.loads(told)
    if job.pop("memory", False):
        return _loaded(Bundle.open(Path(path)), job["threads"])
    if job.pop("pools", False):
        return _in_pools(Path(path), job["threads"])
    from dynexport.runtime.measure.bench import Workload, benchmark

    workload = Workload(prompt_tokens=8, new_tokens=16, repeats=3, **job)
    return [result.model_dump() for result in benchmark(Bundle.open(Path(path)), workload).results]


def _in_pools(directory: Path, threads: int) -> dict[int, float]:
    """Return time of a decode step through each pool's first layers / of the same step in the smallest, in turn."""
    from dynexport.runtime.execution.executor import Executor

    depth, times = min(HOPS), []
    path = np.full((LAYERS, 8), -1)
    path[:depth] = np.arange(depth)[:, None]
    ways = []
    for layers in POOLS:
        bundle = Bundle.open(directory / f"pool-{layers}")
        executor, routes = Executor(bundle, threads), np.where(path < 0, layers, path)
        cache = executor.full_cache(1, 256)
        executor.prefill(cache, [list(range(8))], forced=[routes])
        ways.append((executor, cache, bundle.manifest.full, routes[:, :1]))
    for _ in range(_STEPS_IN_TURN):
        row = []
        for executor, cache, full, routes in ways:
            start = time.perf_counter()
            executor.step(cache, [1], full, forced=routes)
            row.append(time.perf_counter() - start)
        times.append(row)
    ratios = np.median(np.array(times)[3:] / np.array(times)[3:, :1], axis=0)
    return dict(zip(POOLS, ratios.tolist(), strict=True))


def _loaded(bundle: Bundle, threads: int) -> dict[str, float]:
    from dynexport.runtime.execution.executor import Executor
    from dynexport.runtime.measure.prescribed import every_layer

    before = _resident()
    start = time.perf_counter()
    executor = Executor(bundle, threads)
    cache = executor.full_cache(1, 64)
    routes = every_layer(bundle.manifest)(1, 8)
    executor.prefill(cache, [list(range(8))], forced=routes)
    seconds = time.perf_counter() - start
    for _ in range(8):
        executor.step(cache, [1], bundle.manifest.full, forced=None if routes is None else routes[0][:, :1])
    return {"load_and_prompt_seconds": seconds, "resident_mb": (_resident() - before) / 1e6}


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Make the models once, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=Path("build/radial-speed"), help="for models, bundles and figures"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--all", action="store_true", help="measure pools, memory and loading too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(arguments.worker)))
        return
    told = arguments.directory, arguments.forms
    prepare(*told, pools=arguments.all)
    found = measure(*told, arguments.threads, arguments.pairs)
    if arguments.all:
        found |= measure_rest(*told, arguments.threads, arguments.pairs)
    (arguments.directory / "figures.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
