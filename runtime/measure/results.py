"""Results of a benchmark, as plain data."""

from __future__ import annotations

from pydantic import BaseModel

from dynexport.runtime.bundle.machine import Machine
from dynexport.runtime.engines.registry import Weights
from dynexport.runtime.measure.startup import Startup


class Result(BaseModel):
    """Medians over the repetitions of one run mode.

    Attributes:
        name: "full" for every layer and every token; the depth's name; "routed" for the routers' own decisions;
            "skip 50%" or "hops 4" for prescribed decisions.
        layers: mean number of layers that a decoded token ran.
        prefill_tokens_per_second: prompt tokens per second, all rows together.
        prefill_milliseconds: time of the prefill of all rows together; full depth's where prompts run every layer.
        prefill_least_milliseconds: the shortest prefill.
        prefill_quartiles_milliseconds: lower and upper quartile of the prefills.
        prefill_speedup: median over repetitions of (full depth's prefill time / this prefill time), both measured in
            the same repetition; 1 where prompts run every layer at any depth.
        prefill_speedup_quartiles: lower and upper quartile of the prefill ratios.
        prefill_ideal_speedup: FLOPs of the prompt at full depth / FLOPs of the prompt in this mode.
        decode_milliseconds: time of one decode step for all rows: the median over repetitions of their median steps.
        decode_least_milliseconds: the shortest step of all repetitions.
        decode_quartiles_milliseconds: lower and upper quartile of all steps of all repetitions.
        tokens_per_second: decoded tokens per second, all rows together.
        speedup: median over repetitions of (full depth's step time / this step time), both measured in the same
            repetition.
        speedup_quartiles: lower and upper quartile of the decode ratios.
        steady: whether there are at least three ratios of each kind and their quartiles differ by at most a tenth of
            the median; False means that another measurement may give another result.
        ideal_speedup: bytes that the decode steps must read at full depth / bytes that they must read in this mode.
        efficiency: speedup / ideal_speedup.
        bytes_per_step: bytes that a decode step must read, the mean over the steps: weights once, K/V of every row.
        gigabytes_per_second: bytes that the decode steps must read / their time, in 1e9 bytes per second.
        bandwidth_gigabytes_per_second: read bandwidth of memory, measured beside the repetitions with the same number
            of threads at the size of ``bytes_per_step``; None on a GPU.
        ideal_milliseconds: time of a step that only reads its bytes, at this bandwidth; None on a GPU.
        fits_cache: whether these bytes fit the last-level cache, which is read faster than memory: then ideal_speedup
            and efficiency are no measure of the work that skipping spares. None if the cache's size is unknown.
        others_share: share of the machine that other processes took during this mode's repetitions, 0 to 1; None where
            the system does not tell.
        turned_away: routing decisions in one repetition that were dropped because the layer's cache or capacity was
            full.
    """

    name: str
    layers: float
    prefill_tokens_per_second: float
    prefill_milliseconds: float
    prefill_least_milliseconds: float
    prefill_quartiles_milliseconds: tuple[float, float]
    prefill_speedup: float
    prefill_speedup_quartiles: tuple[float, float]
    prefill_ideal_speedup: float
    decode_milliseconds: float
    decode_least_milliseconds: float
    decode_quartiles_milliseconds: tuple[float, float]
    tokens_per_second: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    steady: bool
    ideal_speedup: float
    efficiency: float
    bytes_per_step: float
    gigabytes_per_second: float
    bandwidth_gigabytes_per_second: float | None
    ideal_milliseconds: float | None
    fits_cache: bool | None
    others_share: float | None
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
        weights: "packed" or "mapped"; see ``open_backend``.
        startup: a cold start of the bundle in a process of its own, to the first token after the prompts; None for
            TensorRT.
        last_level_cache: bytes of the processor's last-level cache; None where the system does not tell, and on a GPU.
        others_share: share of the machine that other processes took during all repetitions; None as for a result.
        spinning: for the bundle and its baseline, whether worker threads wait awake between the steps. They do in a
            session that is alone in its process; a bundle of several graphs has several. Empty on a GPU.
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
    weights: Weights
    startup: Startup | None
    last_level_cache: int | None
    others_share: float | None
    spinning: dict[str, bool]
    results: list[Result]
    engine_share: float | None
    operators: dict[str, float]


__all__ = ["Benchmark", "Result"]
