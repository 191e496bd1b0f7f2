"""How fast a bundle runs, against every layer for every token, and against what must be read or computed at least."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_kind, checked_list
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.bundle.manifest import Manifest
from dynexport.runtime.engines.onnxruntime import check_threads
from dynexport.runtime.engines.registry import RunBackend, backend_text, check_backend
from dynexport.runtime.measure.prescribed import Routes, as_routers_decide, in_order, skipping, walking
from dynexport.runtime.measure.timed_run import WARM_UP_STEPS, Runner, Sizes, Timed
from dynexport.runtime.measure.twin import Twin, check_twin

Array = np.ndarray
# Quartiles of the repetitions' ratios lie within this share of the median where a measurement repeats.
_STEADY = 0.1


class Result(BaseModel):
    """Medians for one way to run.

    Attributes:
        name: "dense" is every layer for every token; else the ratio, "routed" as routers decide, the share of routed
            layers that every token is made to skip, or the length of the path that it is made to take.
        layers: layers that a decoded token ran in, on average.
        prefill_tokens_per_second: of the prompt.
        prefill_speedup: the median over repetitions of dense time / this time, the two measured in turn; 1 where a
            prompt runs in every layer all the same.
        prefill_ideal_speedup: FLOPs of the dense prompt / FLOPs of what ran.
        decode_milliseconds: one step, all rows.
        tokens_per_second: of decoding, all rows together.
        speedup: the median over repetitions of dense time / this time, the two measured in turn.
        speedup_quartiles, prefill_speedup_quartiles: the lower and the upper one of these ratios.
        steady: whether there are at least three ratios of each kind, and their quartiles lie within a tenth of the
            median from each other: otherwise the next measurement may well come out differently.
        ideal_speedup: bytes read by the dense steps / bytes that these very steps had to read.
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


class Benchmark(BaseModel):
    """One run of ``dynexport bench``.

    Attributes:
        baseline: the bundle that "dense" was measured on, in a process of its own where it is another.
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
                "away as its cache or its capacity was full; lower --prompt-tokens and --new-tokens, or name a dense "
                "bundle of the same model with --baseline"
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
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    speedup: str | float | None = None,
    skip_rates: Sequence[float] = (),
    depths: Sequence[int] = (),
    baseline: Bundle | None = None,
    text: Sequence[int] | None = None,
    repeats: int = 7,
    backend: RunBackend = "onnxruntime",
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure every way to run in turn, ``repeats`` times over: a prompt, then greedy decoding.

    A prompt of a bundle without routers runs in every layer at any ratio: it is measured once a repetition.

    Args:
        speedup: measure this ratio only; None measures all that the bundle declares.
        skip_rates: of a routed bundle, besides what its routers decide: shares of its routed layers that every token is
            made to skip.
        depths: of a Radial Network, besides what its routers decide: lengths of paths that every token is made to take.
        baseline: a bundle of the same model with every layer for every token, which runs in a process of its own, idle
            while this one is measured; None takes the bundle itself, routed layers forced to run, or the layers of a
            pool once in order.
        text: token ids that prompts are taken from; None takes random ones.
        backend: what runs the graphs. Every step ends when its logits are in the host's memory, so a GPU has done all.
        threads: intra-op threads, stated so that the figure can be repeated.
        progress: called with repetitions done and in all.

    Raises:
        DynexportError: when the lengths do not fit the context, the baseline is another model, the bundle's own layers
            have no room for every token that "dense" sends there, or an argument is out of range.
    """
    sizes = _sizes(bundle, prompt_tokens, new_tokens, batch, repeats, threads, backend)
    told = _told(bundle.manifest, skip_rates, depths)
    if baseline is not None:
        check_twin(bundle, baseline, sizes)
    elif bundle.manifest.routed is not None:
        _check_room(bundle.manifest.routed.slots, sizes)
    with ExitStack() as processes:
        runner = Runner(bundle, sizes)
        prompts = _prompts(bundle.manifest.model.vocab_size, text, batch, prompt_tokens)
        runner.warm_up(prompts)
        twin = None if baseline is None else processes.enter_context(Twin(baseline, sizes, prompts))
        ways = _ways(bundle, runner, twin, speedup, told)
        for repeat in range(repeats):
            for way in ways:
                way.measure()
            if progress is not None:
                progress(repeat + 1, repeats)
        inside: tuple[float | None, dict[str, float]] = (None, {})
        if backend == "onnxruntime":
            inside = (twin or runner).operators()
    return Benchmark(
        bundle=str(bundle.path),
        baseline=str((baseline or bundle).path),
        precision=bundle.manifest.precision,
        machine=Machine.this(),
        engine=backend_text(backend),
        threads=threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        results=[_result(way, ways[0], sizes) for way in ways],
        engine_share=inside[0],
        operators=inside[1],
    )


def _sizes(
    bundle: Bundle,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    threads: int,
    backend: RunBackend,
) -> Sizes:
    """What all runs have in common, checked."""
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    counts = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch": batch, "repeats": repeats}
    for name, value in counts.items():
        checked_count(name, value)
    check_backend(backend)
    check_threads(threads, needed=True)
    limit = bundle.manifest.model.max_length - WARM_UP_STEPS
    if prompt_tokens + new_tokens > limit:
        raise DynexportError(
            f"prompt_tokens + new_tokens: expected at most {limit} to fit the context with {WARM_UP_STEPS} steps of "
            f"warm-up, found {prompt_tokens + new_tokens}"
        )
    return Sizes(rows=batch, prompt_tokens=prompt_tokens, steps=new_tokens, threads=threads, backend=backend)


def _prompts(vocabulary: int, text: Sequence[int] | None, batch: int, tokens: int) -> Array:
    """int64 [batch, tokens]."""
    if text is None:
        return np.random.default_rng(0).integers(0, vocabulary, (batch, tokens))
    listed = checked_list("text", text, "token ids")
    if len(listed) < batch * tokens:
        raise DynexportError(f"text: expected at least {batch * tokens} tokens for the prompts, found {len(listed)}")
    return checked_ids("text", listed[: batch * tokens], vocabulary).reshape(batch, tokens)


def _told(manifest: Manifest, skip_rates: Sequence[float], depths: Sequence[int]) -> dict[str, Routes]:
    """Names and routes of the ways that are prescribed."""
    skipped = [(rate, skipping(manifest, rate)) for rate in checked_list("skip rates", skip_rates, "shares")]
    deep = [(depth, walking(manifest, depth)) for depth in checked_list("depths", depths, "lengths")]
    return {f"skip {rate:.0%}": routes for rate, routes in skipped} | {f"depth {d}": routes for d, routes in deep}


def _check_room(slots: int, sizes: Sizes) -> None:
    """Raise DynexportError where routed layers cannot hold every token: they would turn "dense" into something else."""
    if sizes.slots > slots:
        raise DynexportError(
            f"dense: expected routed layers with room for every token, here {sizes.slots}, found caches of {slots} "
            "entries; name a dense bundle of the same model with --baseline, or lower --prompt-tokens and --new-tokens"
        )


def _ways(
    bundle: Bundle, runner: Runner, twin: Twin | None, speedup: str | float | None, told: Mapping[str, Routes]
) -> list[_Way]:
    """All ways to run, the dense one first."""
    manifest, full = bundle.manifest, bundle.depth(1)
    if twin is not None:
        dense = _Way("dense", twin.run)
    else:
        dense = _Way("dense", partial(runner.run, routes=_every_layer(manifest)), prescribed=True)
    if manifest.has_routers:
        ways = [_Way(name, partial(runner.run, routes=routes), prescribed=True) for name, routes in told.items()]
        return [dense, _Way("routed", runner.run), *ways]
    declared = manifest.depths if speedup is None else (bundle.depth(speedup),)
    # Its prompt runs in every layer all the same: it need not be run again.
    step = runner.run_steps if twin is None else runner.run
    return [dense, *(_Way(ratio.name, partial(step, ratio)) for ratio in declared if ratio.ratio != full.ratio)]


def _every_layer(manifest: Manifest) -> Routes:
    """What makes every token run every layer."""
    if isinstance(manifest.contract, Radial):
        return in_order(manifest)
    return skipping(manifest, 0.0) if manifest.has_routers else as_routers_decide


def _result(way: _Way, dense: _Way, sizes: Sizes) -> Result:
    seconds, last = statistics.median(way.decode), way.timed[-1]
    decode, prefill = _ratios(dense.decode, way.decode), _ratios(dense.prefill, way.prefill or dense.prefill)
    measured, ideal = statistics.median(decode), dense.timed[-1].bytes / last.bytes
    return Result(
        name=way.name,
        layers=last.layers,
        prefill_tokens_per_second=sizes.rows * sizes.prompt_tokens / statistics.median(way.prefill or dense.prefill),
        prefill_speedup=statistics.median(prefill),
        prefill_speedup_quartiles=quartiles(prefill),
        prefill_ideal_speedup=dense.timed[-1].flops / last.flops,
        decode_milliseconds=1e3 * seconds,
        tokens_per_second=sizes.rows / seconds,
        speedup=measured,
        speedup_quartiles=quartiles(decode),
        steady=way is dense or (is_steady(decode) and is_steady(prefill)),
        ideal_speedup=ideal,
        efficiency=measured / ideal,
        gigabytes_per_second=last.bytes / sizes.steps / seconds / 1e9,
        turned_away=last.turned_away,
    )


def _ratios(dense: Sequence[float], part: Sequence[float]) -> list[float]:
    """Dense time / this time, of each repetition."""
    return [full / own for full, own in zip(dense, part, strict=True)]


def quartiles(ratios: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile, between neighbours where they fall there."""
    lower, upper = np.quantile(ratios, (0.25, 0.75))
    return float(lower), float(upper)


def is_steady(ratios: Sequence[float]) -> bool:
    """Whether their median can be expected to come out the same again, within about a tenth."""
    lower, upper = quartiles(ratios)
    return len(ratios) >= 3 and upper - lower <= _STEADY * statistics.median(ratios)


__all__ = ["Benchmark", "Result", "benchmark", "is_steady", "quartiles"]
