"""Results of a benchmark, as plain data."""

from __future__ import annotations

from pydantic import BaseModel

from dynexport.runtime.bundle.machine import Machine


class Result(BaseModel):
    """Medians over the repetitions of one run mode.

    Attributes:
        name: "full" for every layer and every token; the depth's name; "routed" for the routers' own decisions;
            "skip 50%" or "hops 4" for prescribed decisions.
        layers: mean number of layers that a decoded token ran.
        prefill_tokens_per_second: prompt tokens per second, all rows together.
        prefill_speedup: median over repetitions of (full depth's prefill time / this prefill time), both measured in
            the same repetition; 1 where prompts run every layer at any depth.
        prefill_speedup_quartiles: lower and upper quartile of the prefill ratios.
        prefill_ideal_speedup: FLOPs of the prompt at full depth / FLOPs of the prompt in this mode.
        decode_milliseconds: time of one decode step for all rows.
        tokens_per_second: decoded tokens per second, all rows together.
        speedup: median over repetitions of (full depth's step time / this step time), both measured in the same
            repetition.
        speedup_quartiles: lower and upper quartile of the decode ratios.
        steady: whether there are at least three ratios of each kind and their quartiles differ by at most a tenth of
            the median; False means that another measurement may give another result.
        ideal_speedup: bytes that the decode steps must read at full depth / bytes that they must read in this mode.
        efficiency: speedup / ideal_speedup.
        gigabytes_per_second: bytes that the decode steps must read / their time, in 1e9 bytes per second.
        turned_away: routing decisions in one repetition that were dropped because the layer's cache or capacity was
            full.
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
    """Results of one run of ``dynexport bench``.

    Attributes:
        bundle: directory of the bundle.
        baseline: directory of the bundle that "full" was measured on; it runs in its own process where it is not
            ``bundle``.
        precision: precision of the bundle.
        machine: the machine that ran it.
        engine: description of the backend.
        threads: intra-op threads.
        batch: number of prompts that run together.
        prompt_tokens: length of every prompt.
        new_tokens: number of timed decode steps.
        repeats: number of repetitions.
        results: one entry per run mode, "full" first.
        engine_share: share of a decode step's time that is spent inside the engine, without prescribed decisions, on
            the baseline where there is one; None for a backend without a profiler.
        operators: operator -> share of all operators' time in such a step, largest first; empty without a profiler.
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


__all__ = ["Benchmark", "Result"]
