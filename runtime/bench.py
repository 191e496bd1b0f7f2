"""How fast a bundle runs, against every layer for every token, and against what must be read or computed at least."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.contract import Radial
from dynexport.runtime.cost import attended, path_bytes, path_flops, prompt_flops, realised_bytes
from dynexport.runtime.decoders import AnyCache, AnyDecoder, open_decoder
from dynexport.runtime.engines.opening import RunBackend, backend_text
from dynexport.runtime.engines.profile import operator_times
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.machine import Machine
from dynexport.runtime.manifest import Manifest, Speedup
from dynexport.runtime.prescribed import Routes, as_routers_decide, in_order, skipping, walking

Array = np.ndarray
_WARM_UP_STEPS = 3


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
    """One way to run, and what was measured of it.

    Attributes:
        routes: what its routers are told.
        prefill, decode: seconds, a figure for each repetition.
        bytes, flops: of the last repetition's steps, and of its prompt.
        depth: layers that its decoded tokens ran in, on average.
    """

    name: str
    decoder: AnyDecoder
    cache: AnyCache
    speedup: Speedup
    routes: Routes = as_routers_decide
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    bytes: int = 0
    flops: int = 0
    depth: float = 0.0

    def run(self, prompts: Array, steps: int) -> None:
        """A prompt and the steps after it, timed."""
        self.cache.rewind()
        routes = self.routes(*prompts.shape)
        start = time.perf_counter()
        logits = self.decoder.prefill(self.cache, list(prompts), forced=routes)
        self.prefill.append(time.perf_counter() - start)
        self.flops = _flops(self.decoder.manifest, self.cache)
        self.run_steps(np.concatenate(logits), steps)

    def run_steps(self, logits: Array, steps: int) -> None:
        """The steps after a prompt that the cache holds; it is left as it was."""
        cache, mark = self.cache, self.cache.mark()
        for log in cache.logs or ():
            log.clear()
        routes = self.routes(cache.rows, _WARM_UP_STEPS + steps)
        times = []
        for step in range(_WARM_UP_STEPS + steps):
            tokens = logits.argmax(axis=-1)
            told = None if routes is None else np.stack([row[:, step] for row in routes], axis=1)
            start = time.perf_counter()
            logits = self.decoder.step(cache, tokens, self.speedup, forced=told)
            times.append(time.perf_counter() - start)
        self.decode.append(statistics.median(times[_WARM_UP_STEPS:]))
        read, depths = _read(self.decoder.manifest, cache, mark[0])
        self.bytes, self.depth = sum(read[_WARM_UP_STEPS:]), float(depths[_WARM_UP_STEPS:].mean())
        cache.restore(mark)


def _flops(manifest: Manifest, cache: AnyCache) -> int:
    """Of the prompt that the cache holds."""
    paths = [path for log in cache.logs or () for path in log.paths]
    if not paths:
        return prompt_flops(manifest, cache.lengths)
    return path_flops(manifest, cache.lengths, sum(int((path >= 0).sum()) for path in paths))


def _read(manifest: Manifest, cache: AnyCache, entries: Array) -> tuple[list[int], Array]:
    """Bytes that each of the recorded steps had to read, and layers that each row ran in, int64 [steps, rows].

    Args:
        entries: int64 [layers or steps, rows], in the cache before them.
    """
    logs = cache.logs or []
    if not logs[0].paths:
        ran = np.stack([np.concatenate(log.ran, axis=1) for log in logs], axis=2)
        after = entries[:, None] + ran.cumsum(axis=1)
        return [realised_bytes(manifest, ran[:, t], after[:, t]) for t in range(ran.shape[1])], ran.sum(axis=0)
    paths = np.stack([np.concatenate(log.paths, axis=1) for log in logs], axis=2)
    ran = (paths >= 0) & (paths < manifest.model.layers)
    seen = [attended(manifest, paths[:, :t], entries) for t in range(1, 1 + paths.shape[1])]
    return [path_bytes(manifest, paths[:, t], seen[t]) for t in range(paths.shape[1])], ran.sum(axis=0)


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
        baseline: a bundle of the same model with every layer for every token; None takes the bundle itself, routed
            layers forced to run, or the layers of a pool once in order.
        text: token ids that prompts are taken from; None takes random ones.
        backend: what runs the graphs. Every step ends when its logits are in the host's memory, so a GPU has done all.
        threads: intra-op threads, stated so that the figure can be repeated.
        progress: called with repetitions done and in all.

    Raises:
        DynexportError: when the lengths do not fit the context, or an argument is out of range.
    """
    _check(bundle, prompt_tokens, new_tokens, batch, repeats)
    told = {f"skip {rate:.0%}": skipping(bundle.manifest, rate) for rate in skip_rates}
    told |= {f"depth {depth}": walking(bundle.manifest, depth) for depth in depths}
    size = (batch, prompt_tokens + new_tokens + _WARM_UP_STEPS)
    ways = _ways(bundle, baseline, speedup, told, size, backend, threads)
    prompts = _prompts(bundle, text, batch, prompt_tokens)
    dense = ways[0]
    dense.cache.rewind()
    dense.decoder.prefill(dense.cache, list(prompts))  # warm-up
    for repeat in range(repeats):
        for way in ways:
            if way.cache is dense.cache and way is not dense and not bundle.manifest.has_routers:
                way.flops = dense.flops
                way.run_steps(np.zeros((batch, 1)), new_tokens)
            else:
                way.run(prompts, new_tokens)
        if progress is not None:
            progress(repeat + 1, repeats)
    inside: tuple[float | None, dict[str, float]] = (None, {})
    if backend == "onnxruntime":
        inside = operator_times(dense.decoder, dense.cache, dense.speedup)
    return Benchmark(
        bundle=str(bundle.path),
        baseline=str(dense.decoder.bundle.path),
        precision=bundle.manifest.precision,
        machine=Machine.this(),
        engine=backend_text(backend),
        threads=threads,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=repeats,
        results=[_result(way, dense, prompts.size, new_tokens) for way in ways],
        engine_share=inside[0],
        operators=inside[1],
    )


def _ways(
    bundle: Bundle,
    baseline: Bundle | None,
    speedup: str | float | None,
    told: Mapping[str, Routes],
    size: tuple[int, int],
    backend: RunBackend,
    threads: int,
) -> list[_Way]:
    """The dense way first; ``size`` is rows and slots."""
    manifest, full = bundle.manifest, bundle.speedup(1)
    every = _every_layer(manifest) if baseline is None else as_routers_decide
    decoder = open_decoder(bundle, threads, backend=backend, alone=baseline is None)
    cache = decoder.cache(*size, record=True)
    if baseline is None:
        dense = _Way("dense", decoder, cache, full, every)
    else:
        other = open_decoder(baseline, threads, backend=backend, alone=False)
        dense = _Way("dense", other, other.cache(*size, record=True), baseline.speedup(1))
    if manifest.has_routers:
        routed = _Way("routed", decoder, cache, full)
        return [dense, routed, *(_Way(name, decoder, cache, full, routes) for name, routes in told.items())]
    declared = manifest.speedups if speedup is None else (bundle.speedup(speedup),)
    ratios = [_Way(s.name, decoder, cache, s) for s in declared if s.ratio != full.ratio]
    return [dense, *ratios]


def _every_layer(manifest: Manifest) -> Routes:
    """What makes every token run every layer."""
    if isinstance(manifest.contract, Radial):
        return in_order(manifest)
    return skipping(manifest, 0.0) if manifest.has_routers else as_routers_decide


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
