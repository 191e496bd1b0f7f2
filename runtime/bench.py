"""How fast a bundle runs, against itself at full depth and against the bytes that must be read."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.cache import Cache
from dynexport.runtime.cost import ideal_speedup, step_bytes
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.engines.profile import operator_times
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.machine import Machine
from dynexport.runtime.manifest import Speedup

_WARM_UP_STEPS = 3


class Result(BaseModel):
    """Medians for one kept set.

    Attributes:
        name: "dense" or the ratio.
        layers: layers that a generated token runs in.
        prefill_tokens_per_second: of the prompt, which runs at full depth whatever the ratio.
        decode_milliseconds: one step, all rows.
        tokens_per_second: of decoding, all rows together.
        speedup: the median over repetitions of dense time / this time, the two measured in turn.
        ideal_speedup: bytes read at full depth / bytes read here.
        efficiency: speedup / ideal_speedup.
        gigabytes_per_second: bytes that must be read / time.
    """

    name: str
    layers: int
    prefill_tokens_per_second: float
    decode_milliseconds: float
    tokens_per_second: float
    speedup: float
    ideal_speedup: float
    efficiency: float
    gigabytes_per_second: float


class Benchmark(BaseModel):
    """One run of ``dynexport bench``.

    Attributes:
        engine_share: part of a full-depth step that is spent inside the engine.
        operators: operator -> share of the engine's time in a full-depth step, largest first.
    """

    bundle: str
    precision: str
    machine: Machine
    threads: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    results: list[Result]
    engine_share: float
    operators: dict[str, float]


def benchmark(
    bundle: Bundle,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    speedup: str | float | None = None,
    repeats: int = 7,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure prefill once and then every kept set in turn, ``repeats`` times over.

    Args:
        speedup: measure this ratio only; None measures all that the bundle declares.
        threads: intra-op threads, stated so that the figure can be repeated.
        progress: called with repetitions done and in all.

    Raises:
        DynexportError: when the lengths do not fit the context, or an argument is out of range.
    """
    _check(bundle, prompt_tokens, new_tokens, batch, repeats)
    declared = bundle.manifest.speedups if speedup is None else (bundle.speedup(speedup),)
    dense = bundle.speedup(1)
    kept = [dense, *(s for s in declared if s.ratio != dense.ratio)]
    decoder = Decoder(bundle, threads)
    cache = decoder.cache(batch, prompt_tokens + new_tokens + _WARM_UP_STEPS)
    prompts = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, (batch, prompt_tokens))

    prefill: list[float] = []
    decode: dict[str, list[float]] = {s.name: [] for s in kept}
    _measure_prefill(decoder, cache, prompts)
    for repeat in range(repeats):
        prefill.append(_measure_prefill(decoder, cache, prompts))
        for s in kept:
            decode[s.name].append(_measure_decode(decoder, cache, prompt_tokens, new_tokens, s))
        if progress is not None:
            progress(repeat + 1, repeats)

    context = prompt_tokens + new_tokens // 2
    engine_share, operators = operator_times(decoder, cache, prompt_tokens, dense)
    prefill_rate = batch * prompt_tokens / statistics.median(prefill)
    return Benchmark(
        bundle=str(bundle.path),
        precision=bundle.manifest.precision,
        machine=Machine.this(),
        threads=threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        results=[_result(bundle, s, decode[s.name], decode[dense.name], prefill_rate, context, batch) for s in kept],
        engine_share=engine_share,
        operators=operators,
    )


def _measure_prefill(decoder: Decoder, cache: Cache, prompts: np.ndarray) -> float:
    cache.rewind()
    start = time.perf_counter()
    decoder.prefill(cache, list(prompts))
    return time.perf_counter() - start


def _measure_decode(decoder: Decoder, cache: Cache, prompt: int, steps: int, speedup: Speedup) -> float:
    """Median seconds of a step after the prompt that the cache holds; the cache is left as it was."""
    tokens = np.ones(cache.rows, np.int64)
    times = []
    for step in range(_WARM_UP_STEPS + steps):
        start = time.perf_counter()
        decoder.step(cache, tokens, speedup)
        if step >= _WARM_UP_STEPS:
            times.append(time.perf_counter() - start)
    cache.lengths[:] = prompt
    cache.positions[:] = prompt
    return statistics.median(times)


def _result(
    bundle: Bundle,
    speedup: Speedup,
    times: Sequence[float],
    dense: Sequence[float],
    prefill: float,
    context: int,
    batch: int,
) -> Result:
    seconds = statistics.median(times)
    measured = statistics.median(full / part for full, part in zip(dense, times, strict=True))
    ideal = ideal_speedup(bundle.manifest, speedup.keep, context, batch)
    return Result(
        name=speedup.name,
        layers=len(speedup.keep),
        prefill_tokens_per_second=prefill,
        decode_milliseconds=1e3 * seconds,
        tokens_per_second=batch / seconds,
        speedup=measured,
        ideal_speedup=ideal,
        efficiency=measured / ideal,
        gigabytes_per_second=step_bytes(bundle.manifest, speedup.keep, context, batch) / seconds / 1e9,
    )


def _check(bundle: Bundle, prompt: int, new: int, batch: int, repeats: int) -> None:
    for name, value in (
        ("prompt_tokens", prompt),
        ("new_tokens", new),
        ("batch", batch),
        ("repeats", repeats),
    ):
        if value < 1:
            raise DynexportError(f"{name}: expected at least 1, found {value}")
    limit = bundle.manifest.model.max_length
    if prompt + new + _WARM_UP_STEPS > limit:
        raise DynexportError(
            f"prompt_tokens + new_tokens: expected at most {limit - _WARM_UP_STEPS} to fit the context with "
            f"{_WARM_UP_STEPS} steps of warm-up, found {prompt + new}"
        )
