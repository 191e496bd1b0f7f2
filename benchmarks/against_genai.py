"""Compare a dense bundle with onnxruntime-genai on the same checkpoint, precision and threads, measured in turn.

Each side runs in a process of its own, because two engines in one process would share its cores, in the order
A B A B ... The medians and the median ratio of neighbours are printed. docs/benchmarks.md says how to make both models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

STEPS = 48
PROMPT = 256


def measure_genai(directory: Path) -> dict[str, float]:
    """Return prefill and decode seconds with onnxruntime-genai's API; its genai_config.json sets the threads."""
    import numpy as np
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))
    prompt = np.random.default_rng(0).integers(0, 40000, PROMPT).astype(np.int32)
    prefill, decode = [], []
    for _ in range(3):
        parameters = genai.GeneratorParams(model)
        length = PROMPT + STEPS + 8
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt)
        generator.generate_next_token()
        prefill.append(time.perf_counter() - start)
        for _ in range(STEPS):
            start = time.perf_counter()
            generator.generate_next_token()
            decode.append(time.perf_counter() - start)
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[STEPS:])}


def measure_dynexport(directory: Path, threads: int) -> dict[str, float]:
    """Return prefill and decode seconds with dynexport's runtime: prompt, greedy choice, decode steps."""
    import numpy as np

    from dynexport.runtime import Bundle
    from dynexport.runtime.execution.executor import Executor

    executor = Executor(Bundle.open(directory), threads)
    prompt = np.random.default_rng(0).integers(0, 40000, PROMPT)
    cache = executor.full_cache(1, PROMPT + STEPS + 8)
    prefill, decode = [], []
    for _ in range(3):
        cache.rewind(0)
        start = time.perf_counter()
        token = executor.prefill(cache, [prompt])[0].argmax(axis=-1)
        prefill.append(time.perf_counter() - start)
        for _ in range(STEPS):
            start = time.perf_counter()
            token = executor.decode(cache, [0], token.tolist(), [executor.manifest.full], lasting=False).argmax(axis=-1)
            decode.append(time.perf_counter() - start)
    return {"prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[STEPS:])}


def in_process(python: str, *arguments: str) -> dict[str, float]:
    """Return one measurement from a fresh process."""
    output = subprocess.run([python, __file__, *arguments], check=True, capture_output=True, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def main() -> None:
    """Measure one side (in a child), or both in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genai", type=Path, help="directory made by onnxruntime-genai's builder")
    parser.add_argument("--genai-python", default=sys.executable, help="interpreter that has onnxruntime-genai")
    parser.add_argument("--bundle", type=Path, help="dense bundle of the same checkpoint and precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    if options.genai and not options.bundle:
        print(json.dumps(measure_genai(options.genai)))
        return
    if options.bundle and not options.genai:
        print(json.dumps(measure_dynexport(options.bundle, options.threads)))
        return
    config = json.loads((options.genai / "genai_config.json").read_text())
    stated = config["model"]["decoder"]["session_options"].get("intra_op_num_threads")
    if stated != options.threads:
        sys.exit(f"genai_config.json: session_options.intra_op_num_threads: expected {options.threads}, found {stated}")
    ours, theirs = [], []
    for _ in range(options.repeats):
        theirs.append(in_process(options.genai_python, "--genai", str(options.genai)))
        ours.append(in_process(sys.executable, "--bundle", str(options.bundle), "--threads", str(options.threads)))
    for phase in ("prefill", "decode"):
        a, b = [run[phase] for run in ours], [run[phase] for run in theirs]
        ratio = statistics.median(y / x for x, y in zip(a, b, strict=True))
        print(
            f"{phase}: dynexport {1e3 * statistics.median(a):.2f} ms, onnxruntime-genai "
            f"{1e3 * statistics.median(b):.2f} ms, median ratio {ratio:.3f} (over 1: dynexport is faster)"
        )


if __name__ == "__main__":
    main()
