"""Continuous batching against static batches and one request after another, on a bundle, in one process.

    python benchmarks/serving.py BUNDLE --threads 2 --rows 8 --depth 2

All requests are there at once; prompts of 16 to 256 random tokens, 8 to 128 new ones, greedy. The ways run in
turn, ``--repeats`` times. Prints tokens/s, the time to the first token, the time between tokens, and the time outside
the executor's calls as a share of theirs; then the ratios. ``--long`` has, instead, a prompt of 2,000 tokens that comes
while the other rows generate, and a prompt of 1,000 tokens with and without a known prefix. docs/benchmarks.md quotes
the output.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from serving_load import draw

from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.model import Model, load
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import make_work
from dynexport.runtime.serving.watch import Unwatched
from dynexport.runtime.serving.work import Delivery

Array = np.ndarray


@dataclass
class Asked:
    """A request and the times of its tokens."""

    prompt: Array
    new_tokens: int
    times: list[float] = field(default_factory=list)

    def __call__(self, delivery: Delivery) -> None:
        assert delivery.failure is None, delivery.failure
        self.times += [time.perf_counter()] * len(delivery.answered)

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


class Counted(Unwatched):
    """The seconds of all calls of the executor."""

    seconds = 0.0

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        """Add a call."""
        self.seconds += seconds


@dataclass(frozen=True)
class Result:
    """The figures of one run."""

    tokens_per_second: float
    first: float
    gaps: list[float]
    outside: float


def requests(model: Model, count: int, seed: int = 0) -> list[Asked]:
    """Return the requests of ``serving_load.draw``."""
    return [Asked(*one) for one in draw(model.bundle.manifest.model.vocab_size, count, seed)]


def exactly(tokens: int) -> dict[str, Any]:
    """Return the options of an answer of some number of tokens: end tokens do not end it before."""
    return {"max_new_tokens": tokens, "sampling": Sampling(min_new_tokens=tokens)}


def add(scheduler: Scheduler, model: Model, asked: Asked, depth: Depth) -> None:
    """Add a request to a scheduler."""
    scheduler.add(make_work(model, asked.prompt, depth=depth, deliver=asked, **exactly(asked.new_tokens)))


def run(scheduler: Scheduler, model: Model, asked: Sequence[Asked], depth: Depth) -> float:
    """Run requests to their ends; return when they began, as ``time.perf_counter`` has it."""
    begun = time.perf_counter()
    for one in asked:
        add(scheduler, model, one, depth)
    while not scheduler.idle:
        scheduler.step()
    return begun


def continuous(model: Model, asked: list[Asked], depth: Depth, settings: Settings) -> Result:
    """Run all requests by a scheduler."""
    watch = Counted()
    begun = run(Scheduler(model.executor, settings, watch), model, asked, depth)
    return result(asked, begun, watch.seconds)


def static(model: Model, asked: list[Asked], depth: Depth, settings: Settings) -> Result:
    """Run batches of as many requests as there are rows, each to the end of its longest answer."""
    begun = time.perf_counter()
    for start in range(0, len(asked), settings.rows):
        batch = asked[start : start + settings.rows]
        longest = max(one.new_tokens for one in batch)
        prompts = [one.prompt for one in batch]
        for piece in model.stream(prompts, depth=depth, **exactly(longest)):
            one = batch[piece.row]
            if len(one.times) < one.new_tokens:
                one.times.append(time.perf_counter())
    return result(asked, begun, 0.0)


def one_by_one(model: Model, asked: list[Asked], depth: Depth, settings: Settings) -> Result:
    """Run one request after another."""
    begun = time.perf_counter()
    for one in asked:
        for _ in model.stream(one.prompt, depth=depth, **exactly(one.new_tokens)):
            one.times.append(time.perf_counter())
    return result(asked, begun, 0.0)


def result(asked: list[Asked], begun: float, inside: float) -> Result:
    """Return the figures of a run that has just ended."""
    seconds = time.perf_counter() - begun
    tokens = sum(len(one.times) for one in asked)
    return Result(
        tokens / seconds,
        statistics.median(one.times[0] - begun for one in asked),
        sorted(gap for one in asked for gap in one.gaps),
        (seconds - inside) / inside if inside else float("nan"),
    )


WAYS: dict[str, Callable[[Model, list[Asked], Depth, Settings], Result]] = {
    "one by one": one_by_one,
    "static": static,
    "continuous": continuous,
}


def compare(model: Model, depth: Depth, settings: Settings, count: int, repeats: int) -> None:
    """Run the ways in turn and print their medians and ratios."""
    found: dict[str, list[Result]] = {name: [] for name in WAYS}
    for _ in range(repeats):
        for name, way in WAYS.items():
            found[name].append(way(model, requests(model, count), depth, settings))
    for name, results in found.items():
        gaps = [gap for one in results for gap in one.gaps]
        print(
            f"{name}: {statistics.median(one.tokens_per_second for one in results):.0f} tokens/s, first token "
            f"{statistics.median(one.first for one in results):.2f} s, between tokens median "
            f"{1e3 * statistics.median(gaps):.1f} ms, 99 % {1e3 * np.quantile(gaps, 0.99):.1f} ms, outside calls "
            f"{100 * statistics.median(one.outside for one in results):.1f} %"
        )
    for other in ("static", "one by one"):
        pairs = zip(found["continuous"], found[other], strict=True)
        ratios = [new.tokens_per_second / old.tokens_per_second for new, old in pairs]
        print(f"continuous / {other}: {statistics.median(ratios):.2f}x")


def long_prompt(model: Model, depth: Depth, settings: Settings) -> None:
    """Print how long a prompt of 2,000 tokens holds up seven others, in decode steps of theirs."""
    rng = np.random.default_rng(1)
    scheduler = Scheduler(model.executor, settings)
    others = [Asked(rng.integers(3, 1000, 64), 160) for _ in range(settings.rows - 1)]
    for one in others:
        add(scheduler, model, one, depth)
    while not all(len(one.times) > 20 for one in others):
        scheduler.step()
    late, arrived = Asked(rng.integers(3, 1000, 2000), 8), time.perf_counter()
    add(scheduler, model, late, depth)
    while not late.times:
        scheduler.step()
    pairs = [(a, b) for one in others for a, b in zip(one.times, one.times[1:], strict=False)]
    before = statistics.median(b - a for a, b in pairs if b < arrived and a > others[-1].times[2])
    during = [b - a for a, b in pairs if b >= arrived]
    print(
        f"prompt of 2,000 tokens: first token {late.times[0] - arrived:.2f} s; the others' step {1e3 * before:.1f} ms "
        f"before, then between tokens median {np.median(during) / before:.2f}, 99 % "
        f"{np.quantile(during, 0.99) / before:.2f} steps"
    )


def prefix(model: Model, depth: Depth, settings: Settings) -> None:
    """Print the first token's time of a prompt of 1,000 tokens, unknown and known."""
    rng = np.random.default_rng(2)
    kept = Settings(rows=settings.rows, tokens=settings.tokens, chunk=settings.chunk, prefix_bytes=1 << 30)
    scheduler = Scheduler(model.executor, kept)
    ratios = []
    for _ in range(5):
        prompt = rng.integers(3, 1000, 1000)
        taken = []
        for _ in range(2):
            one = Asked(prompt, 2)
            begun = run(scheduler, model, [one], depth)
            taken.append(one.times[0] - begun)
        ratios.append((taken[0] / taken[1], *taken))
    ratio, unknown, known = sorted(ratios)[len(ratios) // 2]
    print(f"prompt of 1,000 tokens: first token {unknown:.3f} s, known {known:.3f} s, {ratio:.1f}x sooner")


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=Settings.chunk)
    parser.add_argument("--depth", default="full")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", action="store_true")
    options = parser.parse_args()
    model = load(options.bundle, threads=options.threads)
    settings, depth = Settings(rows=options.rows, tokens=2304, chunk=options.chunk), model.depth(options.depth)
    continuous(model, requests(model, 4), depth, settings)  # loads the graphs
    if options.long:
        long_prompt(model, depth, settings)
        prefix(model, depth, settings)
    else:
        compare(model, depth, settings, options.requests, options.repeats)


if __name__ == "__main__":
    main()
