"""int8 KV caches beside those of another bundle of the same model: memory, decode steps, prompts, and what they cost.

    python benchmarks/int8_caches.py steps FLOAT_BUNDLE INT8_BUNDLE
    python benchmarks/int8_caches.py prompts FLOAT_BUNDLE INT8_BUNDLE
    python benchmarks/int8_caches.py quality FLOAT_BUNDLE INT8_BUNDLE --text book.txt
    python benchmarks/int8_caches.py memory BUNDLE

steps: bytes per token, and the least milliseconds of a decode step at full depth for 1 and 8 rows with 256, 2,048 and
8,192 tokens (the last one of the context less the steps), in rounds that alternate between the bundles. The entries
that the steps attend to are copies of one row's; they cost what others do. prompts: the median milliseconds of a prompt
at full depth, in chunks of 1,024 tokens, in rounds that alternate. quality: the mean KL divergence and the perplexity
of a text's tokens, run as one prompt in chunks, and as decode steps at the given depth. memory: peak of the process
after one prompt. docs/benchmarks.md quotes these figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

import dynexport
from dynexport.runtime.bundle.machine import peak_memory
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.model import Model

ROUNDS, STEPS, CHUNK = 4, 6, 1024


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["steps", "prompts", "quality", "memory"])
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--window", type=int, default=1024, help="tokens of the text, one window")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens of a piece of the text's prompt")
    parser.add_argument("--depth", help="of the decode steps of quality; the bundle's full depth without it")
    options = parser.parse_args()
    models = [dynexport.load(path, threads=options.threads) for path in options.bundles]
    longest = models[0].bundle.manifest.model.max_length
    contexts = [min(context, longest) for context in options.contexts]
    if options.what == "steps":
        _steps(models, options.rows, contexts)
    elif options.what == "prompts":
        _prompts(models, contexts)
    elif options.what == "memory":
        (prompt,) = _prompts_of(models[0], contexts[:1])
        models[0].executor.prefill(models[0].executor.full_cache(1, len(prompt)), [prompt])
        print(f"{contexts[0]} tokens: peak {peak_memory() / 1e6:.0f} MB")
    else:
        ids = np.array(models[0].text.encode(options.text.read_text())[: options.window])
        for name, found in _qualities(models, ids, options.chunk, options.depth):
            print("{}: mean KL {:.3g}, perplexity {:.4g} and {:.4g}".format(name, *found))


def _steps(models: Sequence[Model], rows: Sequence[int], contexts: Sequence[int]) -> None:
    for model in models:
        print(f"{model.bundle.path}: {_bytes_per_token(model)} bytes per token")
    for count in rows:
        for context in contexts:
            first, second = _least(models, count, context)
            print(f"{count} rows, context {context}: {first:.2f} ms, {second:.2f} ms, {first / second:.2f}x")


def _prompts(models: Sequence[Model], contexts: Sequence[int]) -> None:
    for ids in _prompts_of(models[0], contexts):
        caches = [model.executor.full_cache(1, len(ids)) for model in models]
        times: list[list[float]] = [[] for _ in models]
        for round_ in range(ROUNDS + 1):
            for model, cache, found in zip(models, caches, times, strict=True):
                cache.rewind(0)
                start = time.perf_counter()
                model.executor.prefill(cache, [ids])
                if round_:  # the first one warms up
                    found.append(1e3 * (time.perf_counter() - start))
        medians = [median(found) for found in times]
        shown = ", ".join(f"{found:.0f} ms ({medians[0] / found:.2f}x)" for found in medians)
        print(f"prompt of {len(ids)}: {shown}", flush=True)


def _prompts_of(model: Model, contexts: Sequence[int]) -> list[np.ndarray]:
    vocabulary = model.bundle.manifest.model.vocab_size
    return [np.random.default_rng(0).integers(0, vocabulary, context) for context in contexts]


def _bytes_per_token(model: Model) -> int:
    buffers = model.executor.full_cache(1, 1).buffers
    return sum(buffer.nbytes // buffer.shape[2] for buffer in buffers.values())


def _least(models: Sequence[Model], rows: int, context: int) -> list[float]:
    """Return the least milliseconds of a decode step of every model; the steps end at ``context`` tokens."""
    caches = [_filled(model.executor, rows, context - STEPS * (ROUNDS + 1)) for model in models]
    times: list[list[float]] = [[], []]
    for round_ in range(ROUNDS + 1):
        for index, (model, cache) in enumerate(zip(models, caches, strict=True)):
            for _ in range(STEPS):
                start = time.perf_counter()
                model.executor.step(cache, [1] * rows, model.bundle.manifest.full)
                if round_:  # the first one warms up
                    times[index].append(1e3 * (time.perf_counter() - start))
    return [min(found) for found in times]


def _filled(executor: Executor, rows: int, tokens: int) -> KvCache:
    """Return a cache of rows with ``tokens`` tokens, whose entries repeat those of a short prompt."""
    cache = executor.full_cache(rows, tokens + STEPS * (ROUNDS + 1))
    prompt = np.random.default_rng(0).integers(0, executor.manifest.model.vocab_size, min(tokens, 256))
    executor.prefill(cache, [prompt] * rows, depth=executor.manifest.full)
    for buffer in cache.buffers.values():
        for start in range(len(prompt), tokens, len(prompt)):
            count = min(len(prompt), tokens - start)
            buffer[:, :, start : start + count] = buffer[:, :, :count]
    cache.lengths[:] = cache.positions[:] = tokens
    return cache


def _qualities(
    models: Sequence[Model], ids: np.ndarray, chunk: int, depth: str | None
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Yield the mean KL(first || second) and both perplexities of a text, int64 [tokens], run in two ways."""
    pieces, steps = (
        [_log_probabilities(model, ids, prompt, chunk, depth) for model in models] for prompt in (len(ids), 1)
    )
    yield f"prompt in chunks of {chunk}", _quality(pieces, ids)
    yield f"decode steps, {depth or 'full'}", _quality(steps, ids)


def _quality(found: Sequence[np.ndarray], ids: np.ndarray) -> tuple[float, float, float]:
    """Return the mean KL(first || second) and both perplexities; log probabilities are float32 [tokens - 1, vocab]."""
    first, second = found
    places = np.arange(len(ids) - 1)
    divergence = (np.exp(first) * (first - second)).sum(axis=1).mean()
    perplexities = [float(np.exp(-values[places, ids[1:]].mean())) for values in found]
    return float(divergence), perplexities[0], perplexities[1]


def _log_probabilities(model: Model, ids: np.ndarray, prompt: int, chunk: int, depth: str | None) -> np.ndarray:
    """Return the log probabilities after every token but the last, of which the first ``prompt`` are a prompt."""
    executor, at = model.executor, model.bundle.manifest.full if depth is None else model.bundle.depth(depth)
    cache = executor.full_cache(1, len(ids))
    logits = [executor.prefill(cache, [ids[:prompt]], depth=at, chunk=chunk, all_logits=True)[0]]
    logits += [executor.step(cache, ids[place : place + 1], at) for place in range(prompt, len(ids) - 1)]
    joined = np.concatenate(logits)[: len(ids) - 1]
    shifted = joined - joined.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
