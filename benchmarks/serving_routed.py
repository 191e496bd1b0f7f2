"""Compare the throughput of a routed bundle with its dense twin under the load of serving.py, and with its ideal.

    python benchmarks/serving_routed.py build/mod-speed/mod build/mod-speed/dense
    python benchmarks/serving_routed.py build/mod-speed --make

The twin is the same checkpoint converted with ``--strategy dense``. Each measurement is a process of its own, twin and
routed in turn; both answer the same requests with as many tokens. The ideal divides the twin's seconds of prompts by
the FLOPs that routing saves there, and those of decode steps by the bytes or the FLOPs, whichever it saves more of: a
step reads a layer's weights if any of its rows runs the layer. ``--make`` makes the model of mixture_of_depths.py
(279 M parameters, random) and both bundles in a directory, and compares them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mixture_of_depths import convert_both, save_model
from serving import requests, run
from serving_load import OtherWork

from dynexport.runtime.bundle.manifest import Depth, LayerRouting
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.model import Model, load
from dynexport.runtime.measure.cost import layer_bytes, prompt_flops
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.watch import Unwatched
from dynexport.runtime.serving.work import Answer, Reason

Array = np.ndarray
Figures = dict[str, float]
# The longest prompt and answer of serving.py's load fit.
_MOST_TOKENS = 512


class Spent(Unwatched):
    """Sums the executor's seconds in prompts and in decode steps."""

    prompt = decode = 0.0

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Add a call."""
        if prompt_tokens:
            self.prompt += seconds
        else:
            self.decode += seconds


class Routes(Unwatched):
    """Counts the layers that tokens ran in, and FLOPs; the model has routed layers.

    Attributes:
        prompts: FLOPs of the prompts, if every token ran in every layer and as routed.
        steps: the same of the decode steps.
    """

    def __init__(self, model: Model) -> None:
        self._manifest = model.bundle.manifest
        self.prompts, self.steps = np.zeros(2), np.zeros(2)
        self.layers = self.tokens = 0

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        """Add an answer and its prompt."""
        ran = np.concatenate([one.ran for one in decided], axis=1)
        tokens = len(answer.work.prompt)
        model = self._manifest.model
        heads = 2 * model.hidden_size * model.vocab_size * (ran.shape[1] - tokens)
        for index, each in enumerate((np.ones_like(ran), ran)):
            whole = prompt_flops(self._manifest, each.sum(axis=1, keepdims=True))
            prompt = prompt_flops(self._manifest, each[:, :tokens].sum(axis=1, keepdims=True))
            self.prompts[index] += prompt
            self.steps[index] += whole - prompt + heads
        self.layers, self.tokens = self.layers + int(ran.sum()), self.tokens + ran.shape[1]


class Reading(Executor):
    """An executor that counts the bytes of its decode steps; the model has routed layers.

    Attributes:
        read: bytes that the steps had to read.
        all_read: bytes that they would have read if every token had run in every layer.
    """

    read = all_read = 0

    def decode(
        self,
        cache: KvCache,
        rows: Sequence[int],
        tokens: Sequence[int],
        depths: Sequence[Depth],
        *,
        lasting: bool = True,
    ) -> Array:
        """Run a decode step, as ``Executor.decode``."""
        logits = super().decode(cache, rows, tokens, depths, lasting=lasting)
        assert cache.logs is not None
        ran = np.stack([cache.logs[row][-1].ran[:, 0] for row in rows], axis=1)
        self.read += layer_bytes(self.manifest, ran, cache.lengths[:, list(rows)])
        everything = np.broadcast_to(cache.positions[list(rows)], ran.shape)
        self.all_read += layer_bytes(self.manifest, np.ones_like(ran), everything)
        return logits


def throughput(model: Model, executor: Executor, watch: Unwatched, count: int, rows: int) -> float:
    """Run requests by a scheduler and return the tokens/s."""
    tokens = min(_MOST_TOKENS, model.bundle.manifest.model.max_length)
    scheduler, asked = Scheduler(executor, Settings(rows=rows, tokens=tokens), watch), requests(model, count)
    begun = run(scheduler, model, asked, model.depth("full"))
    return sum(len(one.times) for one in asked) / (time.perf_counter() - begun)


def measure(model: Model, options: argparse.Namespace) -> Figures:
    """Return tokens/s and seconds of one bundle."""
    throughput(model, model.executor, Unwatched(), 4, options.rows)  # loads the graphs
    spent, work = Spent(), OtherWork()
    speed = throughput(model, model.executor, spent, options.requests, options.rows)
    return {"tokens_per_second": speed, "prompt": spent.prompt, "decode": spent.decode, "others": work.share()}


def count(model: Model, options: argparse.Namespace) -> Figures:
    """Return the savings of a bundle's routes: all FLOPs of prompts and bytes of steps / those that are needed."""
    if not isinstance(model.bundle.manifest.routing, LayerRouting):
        sys.exit(f"{options.routed}: expected a bundle with routed layers, found none")
    routes, executor = Routes(model), Reading(model.bundle, options.threads)
    throughput(model, executor, routes, options.requests, options.rows)
    return {
        "layers": routes.layers / routes.tokens,
        "all_layers": model.bundle.manifest.model.layers,
        "prompt_flops": routes.prompts[0] / routes.prompts[1],
        "step_flops": routes.steps[0] / routes.steps[1],
        "step_bytes": executor.all_read / executor.read,
    }


def in_process(way: str, bundle: Path, options: argparse.Namespace) -> Figures:
    """Return the figures of a new process."""
    command = [sys.executable, __file__, str(bundle), "--way", way, "--requests", str(options.requests)]
    command += ["--rows", str(options.rows), "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace) -> None:
    """Run twin and routed in turn, and print medians, their ratio and the ideal."""
    saved = in_process("count", options.routed, options)
    twins, routed, ideals = [], [], []
    for _ in range(options.rounds):
        twins.append(in_process("measure", options.twin, options))
        routed.append(in_process("measure", options.routed, options))
        prompt, decode = twins[-1]["prompt"], twins[-1]["decode"]
        best = max(saved["step_bytes"], saved["step_flops"])
        ideals.append((prompt + decode) / (prompt / saved["prompt_flops"] + decode / best))
    for name, found in (("twin", twins), ("routed", routed)):
        speed, prompt, decode = (
            statistics.median(one[key] for one in found) for key in ("tokens_per_second", "prompt", "decode")
        )
        others = 100 * max(one["others"] for one in found)
        print(
            f"{name}: {speed:.0f} tokens/s, prompts {prompt:.2f} s, decode steps {decode:.2f} s; others took at most "
            f"{others:.0f} % of the machine"
        )
    pairs = list(zip(twins, routed, strict=True))
    ratio = statistics.median(b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs)
    prompts, steps = (statistics.median(a[key] / b[key] for a, b in pairs) for key in ("prompt", "decode"))
    ideal = statistics.median(ideals)
    print(f"{saved['layers']:.1f} of {saved['all_layers']:.0f} layers per token")
    print(f"routed / twin: {ratio:.2f}x, ideal {ideal:.2f}x, efficiency {ratio / ideal:.2f}")
    print(f"prompts {prompts:.2f}x, ideal by FLOPs {saved['prompt_flops']:.2f}x")
    print(f"decode steps {steps:.2f}x, ideal by bytes {saved['step_bytes']:.2f}x, by FLOPs {saved['step_flops']:.2f}x")


def main() -> None:
    """Compare, or measure one bundle (in a child)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("routed", type=Path, help="bundle with routed layers; with --make, the directory to make")
    parser.add_argument("twin", type=Path, nargs="?", help="bundle of the same checkpoint without its routers")
    parser.add_argument("--make", action="store_true", help="make mixture_of_depths.py's model and bundles first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=("measure", "count"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        ways = {"measure": measure, "count": count}
        print(json.dumps(ways[options.way](load(options.routed, threads=options.threads), options)))
        return
    if options.make:
        directory = options.routed
        if not (directory / "model" / "config.json").exists():
            save_model(directory / "model")
            convert_both(directory / "model", directory)
        options.routed, options.twin = directory / "mod", directory / "dense"
    if options.twin is None:
        parser.error("expected a dense bundle beside the routed one, or --make, found none")
    compare(options)


if __name__ == "__main__":
    main()
