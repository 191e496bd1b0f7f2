"""Speed of a bundle, compared with full depth and with the ideal speedup by bytes and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.bundle.manifest import FULL, Depth, Manifest
from dynexport.runtime.engines.onnxruntime import check_threads, waits_awake
from dynexport.runtime.engines.registry import RunBackend, Weights, backend_text, check_backend, check_weights
from dynexport.runtime.measure.bandwidth import ReadBandwidth
from dynexport.runtime.measure.compared import compared_depths
from dynexport.runtime.measure.mode import Mode, others_share, result_of
from dynexport.runtime.measure.prescribed import Routes, every_layer, skipping, walking
from dynexport.runtime.measure.results import Benchmark, Result
from dynexport.runtime.measure.startup import Startup
from dynexport.runtime.measure.timed_run import WARM_UP_STEPS, Runner, Sizes, Timed
from dynexport.runtime.measure.twin import Twin, check_twin

Array = np.ndarray


@dataclass(frozen=True)
class Workload:
    """Settings of a benchmark.

    Attributes:
        threads: intra-op threads; required, so that the measurement can be repeated.
        prompt_tokens: length of every prompt.
        new_tokens: number of timed decode steps.
        batch: number of prompts that run together.
        repeats: number of repetitions; each one measures every run mode once.
        depth: ratio or kept set to measure; None measures every depth of the bundle.
        skip_rates: shares of the routed layers that every token must skip; one more run mode for each. Only for
            bundles with routed layers.
        hops: path lengths that every token must take; one more run mode for each. Only for bundles with paths.
        text: token ids that the prompts are taken from; None uses random token ids.
        backend: what runs the graphs. A step's time includes the copy of its logits to host memory, so the GPU's work
            is complete.
        weights: as for ``open_backend``, for the bundle and its baseline.
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
    weights: Weights = "packed"


def benchmark(
    bundle: Bundle,
    workload: Workload,
    *,
    baseline: Bundle | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure prefill and greedy decoding of every run mode.

    The run modes are measured in turn, ``workload.repeats`` times. Where prompts run every layer at any depth, one
    prefill per repetition is measured.

    Args:
        bundle: the bundle to measure.
        workload: sizes and run modes.
        baseline: a bundle of the same model without routers, for "full"; it runs in its own process, which is idle
            while ``bundle`` is measured. None measures "full" on ``bundle``: every routed layer runs every token, or
            every token runs each layer of a pool once, in order.
        progress: called after every repetition with the number of repetitions done and the total.

    Raises:
        DynexportError: the lengths do not fit the context, the baseline is another model, the caches are too small for
            full depth, or an argument is out of range.
    """
    sizes = _sizes(bundle, workload)
    told = _told(bundle.manifest, workload)
    if baseline is not None:
        check_twin(bundle, baseline, sizes)
    else:
        _check_room(bundle.manifest, sizes)
    runner = Runner(bundle, sizes)
    prompts = _prompts(bundle.manifest.model.vocab_size, workload)
    startup = _startup(bundle, sizes, prompts)
    with ExitStack() as processes:
        runner.warm_up(prompts)
        twin = None if baseline is None else processes.enter_context(Twin(baseline, sizes, prompts))
        modes = _modes(bundle, runner, twin, workload, told)
        memory = ReadBandwidth(sizes.threads) if workload.backend == "onnxruntime" else None
        _take_turns(modes, workload.repeats, memory, progress)
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
        weights=workload.weights,
        startup=startup,
        last_level_cache=None if memory is None else memory.cache,
        others_share=others_share(timed for mode in modes for timed in mode.timed),
        spinning={} if memory is None else _spinning(bundle, baseline or bundle),
        results=[result_of(mode, modes[0], sizes, None if memory is None else memory.cache) for mode in modes],
        engine_share=operators[0],
        operators=operators[1],
    )


def _take_turns(
    modes: Sequence[Mode],
    repeats: int,
    memory: ReadBandwidth | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Time every run mode once per repetition, then the memory at the size of each mode's step."""
    for repeat in range(repeats):
        for mode in modes:
            mode.measure()
        if memory is not None:
            for mode in modes:
                mode.measure_bandwidth(memory)
        if progress is not None:
            progress(repeat + 1, repeats)


def _startup(bundle: Bundle, sizes: Sizes, prompts: Array) -> Startup | None:
    """Return the times of a start in a process of its own; None for TensorRT, which would fill the GPU twice."""
    if sizes.backend != "onnxruntime":
        return None
    with Twin(bundle, sizes, prompts, name="start") as started:
        return started.startup


def _spinning(*bundles: Bundle) -> dict[str, bool]:
    return {str(bundle.path): waits_awake(bundle.manifest) for bundle in bundles}


def _sizes(bundle: Bundle, workload: Workload) -> Sizes:
    """Check the workload's sizes and return them."""
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    checked_kind("workload", workload, Workload, "a Workload")
    for name in ("prompt_tokens", "new_tokens", "batch", "repeats"):
        checked_count(name, getattr(workload, name))
    check_backend(workload.backend)
    check_weights(bundle, workload.backend, workload.weights)
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
        weights=workload.weights,
    )


def _prompts(vocabulary: int, workload: Workload) -> Array:
    """Return the prompts' token ids, int64 [batch, tokens]."""
    shape = workload.batch, workload.prompt_tokens
    if workload.text is None:
        return np.random.default_rng(0).integers(0, vocabulary, shape)
    listed, needed = checked_list("text", workload.text, "token ids"), math.prod(shape)
    if len(listed) < needed:
        raise DynexportError(f"text: expected at least {needed} tokens for the prompts, found {len(listed)}")
    return checked_ids("text", listed[:needed], vocabulary).reshape(shape)


def _told(manifest: Manifest, workload: Workload) -> dict[str, Routes]:
    """Return the prescribed run modes: name -> decisions."""
    rates, hops = (
        checked_list("skip rates", workload.skip_rates, "shares"),
        checked_list("hops", workload.hops, "lengths"),
    )
    skipped = [(rate, skipping(manifest, rate)) for rate in rates]
    walked = [(length, walking(manifest, length)) for length in hops]
    return {f"skip {rate:.0%}": routes for rate, routes in skipped} | {f"hops {n}": routes for n, routes in walked}


def _check_room(manifest: Manifest, sizes: Sizes) -> None:
    """Raise DynexportError where a layer's cache cannot hold every token of full depth."""
    most = min((cache.most for cache in manifest.caches if cache.most is not None), default=None)
    if most is not None and sizes.slots > most:
        raise DynexportError(
            f"{FULL}: expected routed layers with room for every token, here {sizes.slots}, found caches of {most} "
            "entries; name a bundle of the same model without routers with --baseline, or lower --prompt-tokens and "
            "--new-tokens"
        )


def _modes(
    bundle: Bundle, runner: Runner, twin: Twin | None, workload: Workload, told: dict[str, Routes]
) -> list[Mode]:
    """Return all run modes, full depth first."""
    if twin is not None:
        full = Mode(FULL, twin.run)
    else:
        full = Mode(FULL, partial(runner.run, routes=every_layer(bundle.manifest)), prescribed=True)
    everything, *others = compared_depths(bundle, workload.depth)
    if bundle.manifest.routing is not None:
        modes = [Mode(name, partial(runner.run, routes=routes), prescribed=True) for name, routes in told.items()]
        return [full, Mode("routed", runner.run), *modes]

    def run(depth: Depth) -> Callable[[], Timed]:
        # The prefill is the same as at full depth: its result is in the cache.
        same = twin is None and depth.prompt == everything.prompt
        return partial(runner.run_steps if same else runner.run, depth)

    return [full, *(Mode(depth.name, run(depth)) for depth in others)]


__all__ = ["Benchmark", "Result", "Workload", "benchmark"]
