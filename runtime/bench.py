"""How fast a bundle runs, against every layer for every token, and against what must be read or computed at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.cache import Cache
from dynexport.runtime.contract import Radial
from dynexport.runtime.cost import prompt_flops, realised_bytes
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.engines.profile import operator_times
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.machine import Machine
from dynexport.runtime.manifest import Speedup

Array = np.ndarray
_WARM_UP_STEPS = 3


class Result(BaseModel):
    """Medians for one way to run.

    Attributes:
        name: "dense" is every layer for every token; else the ratio, "routed" as routers decide, or the share of routed
            layers that every token is made to skip.
        layers: layers that a decoded token ran in, on average.
        prefill_tokens_per_second: of the prompt.
        prefill_speedup: the median over repetitions of dense time / this time, the two measured in turn; 1 where a
            prompt runs in every layer all the same.
        prefill_ideal_speedup: FLOPs of the dense prompt / FLOPs of what ran.
        decode_milliseconds: one step, all rows.
        tokens_per_second: of decoding, all rows together.
        speedup: the median over repetitions of dense time / this time, the two measured in turn.
        ideal_speedup: bytes read by the dense steps / bytes that these very steps had to read.
        efficiency: speedup / ideal_speedup.
        gigabytes_per_second: bytes that must be read / time.
    """

    name: str
    layers: float
    prefill_tokens_per_second: float
    prefill_speedup: float
    prefill_ideal_speedup: float
    decode_milliseconds: float
    tokens_per_second: float
    speedup: float
    ideal_speedup: float
    efficiency: float
    gigabytes_per_second: float


class Benchmark(BaseModel):
    """One run of ``dynexport bench``.

    Attributes:
        baseline: the bundle that "dense" was measured on.
        engine_share: part of a step of the first result that is spent inside the engine.
        operators: operator -> share of the engine's time in such a step, largest first.
    """

    bundle: str
    baseline: str
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


@dataclass
class _Way:
    """One way to run, and what was measured of it.

    Attributes:
        skip_rate: share of routed layers that every token skips; None leaves it to the routers.
        prefill, decode: seconds, a figure for each repetition.
        bytes, flops: of the last repetition's steps, and of its prompt.
        depth: layers that its decoded tokens ran in, on average.
    """

    name: str
    decoder: Decoder
    cache: Cache
    speedup: Speedup
    skip_rate: float | None = None
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    bytes: int = 0
    flops: int = 0
    depth: float = 0.0

    def run(self, prompts: Array, steps: int) -> None:
        """A prompt and the steps after it, timed."""
        self.cache.rewind()
        start = time.perf_counter()
        logits = self.decoder.prefill(self.cache, list(prompts), forced=self._forced(prompts.shape[1]))
        self.prefill.append(time.perf_counter() - start)
        self.flops = prompt_flops(self.decoder.manifest, self.cache.lengths)
        self.run_steps(np.concatenate(logits), steps)

    def run_steps(self, logits: Array, steps: int) -> None:
        """The steps after a prompt that the cache holds; it is left as it was."""
        cache, mark = self.cache, self.cache.mark()
        for log in cache.logs or ():
            log.clear()
        forced = self._forced(_WARM_UP_STEPS + steps)
        times = []
        for step in range(_WARM_UP_STEPS + steps):
            tokens = logits.argmax(axis=-1)
            wish = None if forced is None else np.stack([row[:, step] for row in forced], axis=1)
            start = time.perf_counter()
            logits = self.decoder.step(cache, tokens, self.speedup, forced=wish)
            times.append(time.perf_counter() - start)
        self.decode.append(statistics.median(times[_WARM_UP_STEPS:]))
        self._count(mark[0])
        cache.restore(mark)

    def _count(self, entries: Array) -> None:
        """What the steps had to read, from what ran; entries int64 [layers, rows] before them."""
        ran = np.stack([np.concatenate(log.ran, axis=1) for log in self.cache.logs or ()], axis=1)
        after = entries[:, :, None] + ran.cumsum(axis=2)
        counted = range(_WARM_UP_STEPS, ran.shape[2])
        self.bytes = sum(realised_bytes(self.decoder.manifest, ran[:, :, t], after[:, :, t]) for t in counted)
        self.depth = float(ran[:, :, _WARM_UP_STEPS:].sum(axis=0).mean())

    def _forced(self, tokens: int) -> list[Array] | None:
        """Per row bool [R, tokens]: tokens skip equally many layers, or one more where the rate lies between.

        Which ones they are differs from token to token and from row to row.
        """
        routed = self.decoder.manifest.routed
        if routed is None or self.skip_rate is None:
            return None
        generator = np.random.default_rng(1)
        size = (self.cache.rows, tokens)
        ranks = generator.permuted(np.tile(np.arange(len(routed.layers)), (*size, 1)), axis=2)
        skipped = np.floor(self.skip_rate * len(routed.layers) + generator.random(size))
        return list((ranks >= skipped[:, :, None]).transpose(0, 2, 1))


def benchmark(
    bundle: Bundle,
    *,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    batch: int = 1,
    speedup: str | float | None = None,
    skip_rates: Sequence[float] = (),
    baseline: Bundle | None = None,
    text: Sequence[int] | None = None,
    repeats: int = 7,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure every way to run in turn, ``repeats`` times over: a prompt, then greedy decoding.

    A prompt of a bundle without routers runs in every layer at any ratio: it is measured once a repetition.

    Args:
        speedup: measure this ratio only; None measures all that the bundle declares.
        skip_rates: of a routed bundle, besides what its routers decide: shares of its routed layers that every token is
            made to skip.
        baseline: a bundle of the same model with every layer for every token; None takes the bundle itself, routed
            layers forced to run.
        text: token ids that prompts are taken from; None takes random ones.
        threads: intra-op threads, stated so that the figure can be repeated.
        progress: called with repetitions done and in all.

    Raises:
        DynexportError: when the lengths do not fit the context, or an argument is out of range.
    """
    _check(bundle, prompt_tokens, new_tokens, batch, repeats, skip_rates)
    ways = _ways(bundle, baseline, speedup, skip_rates, (batch, prompt_tokens + new_tokens + _WARM_UP_STEPS), threads)
    prompts = _prompts(bundle, text, batch, prompt_tokens)
    dense = ways[0]
    dense.cache.rewind()
    dense.decoder.prefill(dense.cache, list(prompts))  # warm-up
    for repeat in range(repeats):
        for way in ways:
            if way.cache is dense.cache and way is not dense and bundle.manifest.routed is None:
                way.flops = dense.flops
                way.run_steps(np.zeros((batch, 1)), new_tokens)
            else:
                way.run(prompts, new_tokens)
        if progress is not None:
            progress(repeat + 1, repeats)
    engine_share, operators = operator_times(dense.decoder, dense.cache, dense.speedup)
    return Benchmark(
        bundle=str(bundle.path),
        baseline=str(dense.decoder.bundle.path),
        precision=bundle.manifest.precision,
        machine=Machine.this(),
        threads=threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        results=[_result(way, dense, prompts.size, new_tokens) for way in ways],
        engine_share=engine_share,
        operators=operators,
    )


def _ways(
    bundle: Bundle,
    baseline: Bundle | None,
    speedup: str | float | None,
    skip_rates: Sequence[float],
    size: tuple[int, int],
    threads: int,
) -> list[_Way]:
    """The dense way first; ``size`` is rows and slots."""
    decoder = Decoder(bundle, threads, alone=baseline is None)
    cache = decoder.cache(*size, record=True)
    full = bundle.speedup(1)
    if baseline is None:
        dense = _Way("dense", decoder, cache, full, 0.0)
    else:
        other = Decoder(baseline, threads, alone=False)
        dense = _Way("dense", other, other.cache(*size, record=True), baseline.speedup(1), 0.0)
    if bundle.manifest.routed is not None:
        routed = _Way("routed", decoder, cache, full)
        return [dense, routed, *(_Way(f"skip {rate:.0%}", decoder, cache, full, rate) for rate in skip_rates)]
    declared = bundle.manifest.speedups if speedup is None else (bundle.speedup(speedup),)
    ratios = [_Way(s.name, decoder, cache, s) for s in declared if s.ratio != full.ratio]
    return [dense, *ratios]


def _result(way: _Way, dense: _Way, prompt: int, steps: int) -> Result:
    seconds = statistics.median(way.decode)
    measured = _ratio(dense.decode, way.decode)
    ideal = dense.bytes / way.bytes
    prefilled = way.prefill or dense.prefill
    return Result(
        name=way.name,
        layers=way.depth,
        prefill_tokens_per_second=prompt / statistics.median(prefilled),
        prefill_speedup=_ratio(dense.prefill, prefilled),
        prefill_ideal_speedup=dense.flops / way.flops,
        decode_milliseconds=1e3 * seconds,
        tokens_per_second=way.cache.rows / seconds,
        speedup=measured,
        ideal_speedup=ideal,
        efficiency=measured / ideal,
        gigabytes_per_second=way.bytes / steps / seconds / 1e9,
    )


def _ratio(dense: Sequence[float], part: Sequence[float]) -> float:
    return statistics.median(full / own for full, own in zip(dense, part, strict=True))


def _prompts(bundle: Bundle, text: Sequence[int] | None, batch: int, tokens: int) -> Array:
    """int64 [batch, tokens]."""
    if text is None:
        return np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, (batch, tokens))
    if len(text) < batch * tokens:
        raise DynexportError(f"text: expected at least {batch * tokens} tokens for the prompts, found {len(text)}")
    return np.array(text[: batch * tokens], np.int64).reshape(batch, tokens)


def _check(bundle: Bundle, prompt: int, new: int, batch: int, repeats: int, skip_rates: Sequence[float]) -> None:
    if isinstance(bundle.manifest.contract, Radial):
        raise DynexportError(f"{bundle.path}: expected a strategy other than radial, which bench cannot measure yet")
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
    if skip_rates and bundle.manifest.routed is None:
        raise DynexportError(f"skip rates: expected a bundle with routers, found {bundle.manifest.contract.strategy}")
    for rate in skip_rates:
        if not 0 <= rate <= 1:
            raise DynexportError(f"skip rates: expected shares from 0 to 1, found {rate}")
