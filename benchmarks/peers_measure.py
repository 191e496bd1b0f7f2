"""One engine, one model, one shape, one process: load, prompts, greedy decode steps. Prints one line of JSON.

    python benchmarks/peers_measure.py llama model.gguf --prompt 256 --new 128 --batch 1 --threads 2
    python benchmarks/peers_measure.py openvino DIRECTORY --logits ids.npy logits.npy

Run it with the interpreter that has the engine; benchmarks/peers.py does. It needs numpy and that engine only. With
``--logits`` it writes the logits of windows of ids, float32 [windows, tokens, vocabulary], and prints nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers_engines import ENGINES, Engine, OpenVino, Shape
from serving_load import OtherWork


def measured(engine: Engine, shape: Shape) -> dict[str, Any]:
    """Return the times of prompts and steps, after a short warm-up of the same shape."""
    start = time.perf_counter()
    engine.prefill()
    first = time.perf_counter() - start
    engine.step()
    engine.step()
    others, prefill, steps = OtherWork(), [], []
    for _ in range(shape.repeats):
        start = time.perf_counter()
        engine.prefill()
        prefill.append(time.perf_counter() - start)
    during = others.share()
    others = OtherWork()
    for _ in range(shape.new):
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
    return {
        "first": first,
        "prefill": prefill,
        "steps": steps,
        "others_prefill": during,
        "others_decode": others.share(),
    }


def peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def main() -> None:
    """Measure, or write logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    for name, value in Shape(256, 128, 1, 2, 3)._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the engine")
    parser.add_argument("--logits", nargs=2, metavar=("IDS", "LOGITS"), help="files of NumPy arrays")
    options = parser.parse_args()
    kind, settings = ENGINES[options.engine], dict(pair.split("=", 1) for pair in options.set)
    if options.logits:
        ids, into = options.logits
        np.save(into, kind.logits(options.model, np.load(ids), options.threads, settings).astype(np.float32))
        return
    shape = Shape(*(getattr(options, name) for name in Shape._fields))
    start = time.perf_counter()
    engine = kind(options.model, shape, settings)
    load = time.perf_counter() - start
    found = engine.measure() if isinstance(engine, OpenVino) else measured(engine, shape)
    versions = {name: importlib.metadata.version(name) for name in kind.packages}
    print(json.dumps({"versions": versions, "load": load, **found, "peak": peak_bytes()}), flush=True)


if __name__ == "__main__":
    main()
