"""How fast a bundle runs, against full depth, and against what must be read or computed at least."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.bundle.manifest import FULL, Depth, Manifest
from dynexport.runtime.engines.onnxruntime import check_threads
from dynexport.runtime.engines.registry import RunBackend, backend_text, check_backend
from dynexport.runtime.measure.compared import compared_depths
from dynexport.runtime.measure.prescribed import Routes, every_layer, skipping, walking
from dynexport.runtime.measure.timed_run import WARM_UP_STEPS, Runner, Sizes, Timed
from dynexport.runtime.measure.twin import Twin, check_twin

Array = np.ndarray
# Quartiles of the repetitions' ratios lie within this share of the median where a measurement repeats.
_STEADY = 0.1


class Result(BaseModel):
    """Medians for one way to run.

    Attributes:
        name: "full" is every layer for every token; else the depth's, "routed" as routers decide, the share of routed
            layers that every token is made to skip, or the length of the path that it is made to take.
        layers: layers that a decoded token ran in, on average.
        prefill_tokens_per_second: of the prompt.
        prefill_speedup: the median over repetitions of full depth's time / this time, the two measured in turn; 1
            where a prompt runs in every layer all the same.
        prefill_ideal_speedup: FLOPs of the prompt at full depth / FLOPs of what ran.
        decode_milliseconds: one step, all rows.
        tokens_per_second: of decoding, all rows together.
        speedup: the median over repetitions of full depth's time / this time, the two measured in turn.
        speedup_quartiles, prefill_speedup_quartiles: the lower and the upper one of these ratios.
        steady: whether there are at least three ratios of each kind, and their quartiles lie within a tenth of the
            median from each other: otherwise the next measurement may well come out differently.
        ideal_speedup: bytes read by the steps at full depth / bytes that these very steps had to read.
        efficiency: speedup / ideal_speedup.
        gigabytes_per_second: bytes that must be read / time.
        turned_away: how often in a repetition a full layer had no room for a token that its router had sent.
    """

    name: str
    layers: float
    prefill_tokens_per_second: float
    prefill_speedup: float
    prefill_speedup_quartiles: tuple[float, float]
    prefill_ideal_speedup: float
    decode_milliseconds: float
    tokens_per_second: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    steady: bool
    ideal_speedup: float
    efficiency: float
    gigabytes_per_second: float
    turned_away: int


@dataclass(frozen=True)
class Workload:
    """What is measured, and how.

    Attributes:
        threads: intra-op threads, stated so that the figure can be repeated.
        prompt_tokens: of every prompt.
        new_tokens: decode steps that are timed.
        batch: prompts that run together.
        repeats: how often all ways are measured in turn.
        depth: measure this ratio or kept set only; None measures all that the bundle declares.
        skip_rates: of a bundle with routed layers, besides what its routers decide: shares of them that every token is
            made to skip.
        hops: of a bundle with paths, besides what its routers decide: lengths of paths that every token is made to
            take.
        text: token ids that prompts are taken from; None takes random ones.
        backend: what runs the graphs. Every step ends when its logits are in the host's memory, so a GPU has done all.
    """

    threads: int
    prompt_tokens: int = 256
    new_tokens: int = 32
    batch: int = 1
    repeats: int = 7
    depth: str | float | None = None
    skip_rates: Sequence[float] = ()
    hops: Sequence[int] = ()
    text: Sequence[int] | None = None
    backend: RunBackend = "onnxruntime"


class Benchmark(BaseModel):
    """One run of ``dynexport bench``.

    Attributes:
        baseline: the bundle that "full" was measured on, in a process of its own where it is another.
        engine: what ran the graphs, in words.
        engine_share: part of a step of the first result that is spent inside the engine; None where it does not tell.
        operators: operator -> share of the engine's time in such a step, largest first; none where it does not tell.
    """

    bundle: str
    baseline: str
    precision: str
    machine: Machine
    engine: str
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    results: list[Result]
    engine_share: float | None
    operators: dict[str, float]


@dataclass
class _Way:
    """One way to run, and what was timed of it.

    Attributes:
        run: runs it once.
        prescribed: whether it has to run what its name says, no matter what routers would decide.
    """

    name: str
    run: Callable[[], Timed]
    prescribed: bool = False
    timed: list[Timed] = field(default_factory=list)

    def measure(self) -> None:
        """Time it once more. Raises DynexportError where layers had no room for tokens that were sent there."""
        timed = self.run()
        if self.prescribed and timed.turned_away:
            raise DynexportError(
                f"{self.name}: expected room for every token that is sent to a layer, found {timed.turned_away} turned "
                "away as its cache or its capacity was full; lower --prompt-tokens and --new-tokens, or name a bundle "
                "of the same model without routers with --baseline"
            )
        self.timed.append(timed)

    @property
    def decode(self) -> list[float]:
        """Seconds of a step, of each repetition."""
        return [timed.decode_seconds for timed in self.timed]

    @property
    def prefill(self) -> list[float]:
        """Seconds of the prompt, of each repetition in which there was one."""
        return [timed.prefill_seconds for timed in self.timed if timed.prefill_seconds is not None]


def benchmark(
    bundle: Bundle,
    workload: Workload,
    *,
    baseline: Bundle | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure every way to run in turn, ``workload.repeats`` times over: a prompt, then greedy decoding.

    A prompt that runs in every layer at any depth is measured once a repetition.

    Args:
        baseline: a bundle of the same model with every layer for every token, which runs in a process of its own, idle
            while this one is measured; None takes the bundle itself, routed layers forced to run, or the layers of a
            pool once in order.
        progress: called with repetitions done and in all.

    Raises:
        DynexportError: when the lengths do not fit the context, the baseline is another model, the bundle's own layers
            have no room for every token that full depth sends there, or an argument is out of range.
    """
    sizes = _sizes(bundle, workload)
    told = _told(bundle.manifest, workload)
    if baseline is not None:
        check_twin(bundle, baseline, sizes)
    else:
        _check_room(bundle.manifest, sizes)
    with ExitStack() as processes:
        runner = Runner(bundle, sizes)
        prompts = _prompts(bundle.manifest.model.vocab_size, workload)
        runner.warm_up(prompts)
        twin = None if baseline is None else processes.enter_context(Twin(baseline, sizes, prompts))
        ways = _ways(bundle, runner, twin, workload, told)
        _take_turns(ways, workload.repeats, progress)
        operators = (twin or runner).operators() if workload.backend == "onnxruntime" else (None, {})
    return Benchmark(
        bundle=str(bundle.path),
        baseline=str((baseline or bundle).path),
        precision=bundle.manifest.precision,
        machine=Machine.this(),
        engine=backend_text(workload.backend),
        threads=workload.threads,
        batch=workload.batch,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        repeats=workload.repeats,
        results=[_result(way, ways[0], sizes) for way in ways],
        engine_share=operators[0],
        operators=operators[1],
    )


def _take_turns(ways: Sequence[_Way], repeats: int, progress: Callable[[int, int], None] | None) -> None:
    """Time every way once a repetition."""
    for repeat in range(repeats):
        for way in ways:
            way.measure()
        if progress is not None:
            progress(repeat + 1, repeats)


def _sizes(bundle: Bundle, workload: Workload) -> Sizes:
    """What all runs have in common, checked."""
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    checked_kind("workload", workload, Workload, "a Workload")
    for name in ("prompt_tokens", "new_tokens", "batch", "repeats"):
        checked_count(name, getattr(workload, name))
    check_backend(workload.backend)
    check_threads(workload.threads, needed=True)
    tokens, limit = workload.prompt_tokens + workload.new_tokens, bundle.manifest.model.max_length - WARM_UP_STEPS
    if tokens > limit:
        raise DynexportError(
            f"prompt_tokens + new_tokens: expected at most {limit} to fit the context with {WARM_UP_STEPS} steps of "
            f"warm-up, found {tokens}"
        )
    return Sizes(
        rows=workload.batch,
        prompt_tokens=workload.prompt_tokens,
        steps=workload.new_tokens,
        threads=workload.threads,
        backend=workload.backend,
    )


def _prompts(vocabulary: int, workload: Workload) -> Array:
    """int64 [batch, tokens]."""
    shape = workload.batch, workload.prompt_tokens
    if workload.text is None:
        return np.random.default_rng(0).integers(0, vocabulary, shape)
    listed, needed = checked_list("text", workload.text, "token ids"), math.prod(shape)
    if len(listed) < needed:
        raise DynexportError(f"text: expected at least {needed} tokens for the prompts, found {len(listed)}")
    return checked_ids("text", listed[:needed], vocabulary).reshape(shape)


def _told(manifest: Manifest, workload: Workload) -> dict[str, Routes]:
    """Names and decisions of the ways that are prescribed."""
    rates, hops = (
        checked_list("skip rates", workload.skip_rates, "shares"),
        checked_list("hops", workload.hops, "lengths"),
    )
    skipped = [(rate, skipping(manifest, rate)) for rate in rates]
    walked = [(length, walking(manifest, length)) for length in hops]
    return {f"skip {rate:.0%}": routes for rate, routes in skipped} | {f"hops {n}": routes for n, routes in walked}


def _check_room(manifest: Manifest, sizes: Sizes) -> None:
    """Raise DynexportError where a layer's cache cannot hold every token: full depth would be something else."""
    most = min((cache.most for cache in manifest.caches if cache.most is not None), default=None)
    if most is not None and sizes.slots > most:
        raise DynexportError(
            f"{FULL}: expected routed layers with room for every token, here {sizes.slots}, found caches of {most} "
            "entries; name a bundle of the same model without routers with --baseline, or lower --prompt-tokens and "
            "--new-tokens"
        )


def _ways(bundle: Bundle, runner: Runner, twin: Twin | None, workload: Workload, told: dict[str, Routes]) -> list[_Way]:
    """All ways to run, full depth first."""
    if twin is not None:
        full = _Way(FULL, twin.run)
    else:
        full = _Way(FULL, partial(runner.run, routes=every_layer(bundle.manifest)), prescribed=True)
    everything, *others = compared_depths(bundle, workload.depth)
    if bundle.manifest.routing is not None:
        ways = [_Way(name, partial(runner.run, routes=routes), prescribed=True) for name, routes in told.items()]
        return [full, _Way("routed", runner.run), *ways]

    def run(depth: Depth) -> Callable[[], Timed]:
        # A prompt that runs in every layer all the same need not be run again.
        same = twin is None and depth.prompt == everything.prompt
        return partial(runner.run_steps if same else runner.run, depth)

    return [full, *(_Way(depth.name, run(depth)) for depth in others)]


def _result(way: _Way, full: _Way, sizes: Sizes) -> Result:
    seconds, last = statistics.median(way.decode), way.timed[-1]
    decode, prefill = _ratios(full.decode, way.decode), _ratios(full.prefill, way.prefill or full.prefill)
    measured, ideal = statistics.median(decode), full.timed[-1].bytes / last.bytes
    return Result(
        name=way.name,
        layers=last.layers,
        prefill_tokens_per_second=sizes.rows * sizes.prompt_tokens / statistics.median(way.prefill or full.prefill),
        prefill_speedup=statistics.median(prefill),
        prefill_speedup_quartiles=quartiles(prefill),
        prefill_ideal_speedup=full.timed[-1].flops / last.flops,
        decode_milliseconds=1e3 * seconds,
        tokens_per_second=sizes.rows / seconds,
        speedup=measured,
        speedup_quartiles=quartiles(decode),
        steady=way is full or (is_steady(decode) and is_steady(prefill)),
        ideal_speedup=ideal,
        efficiency=measured / ideal,
        gigabytes_per_second=last.bytes / sizes.steps / seconds / 1e9,
        turned_away=last.turned_away,
    )


def _ratios(full: Sequence[float], part: Sequence[float]) -> list[float]:
    """Full depth's time / this time, of each repetition."""
    return [whole / own for whole, own in zip(full, part, strict=True)]


def quartiles(ratios: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile, between neighbours where they fall there."""
    lower, upper = np.quantile(ratios, (0.25, 0.75))
    return float(lower), float(upper)


def is_steady(ratios: Sequence[float]) -> bool:
    """Whether their median can be expected to come out the same again, within about a tenth."""
    lower, upper = quartiles(ratios)
    return len(ratios) >= 3 and upper - lower <= _STEADY * statistics.median(ratios)


__all__ = ["Benchmark", "Result", "Workload", "benchmark", "is_steady", "quartiles"]
