"""int8 KV caches beside those of another bundle of the same model: memory, decode steps, and what they cost.

    python benchmarks/int8_caches.py FLOAT_BUNDLE INT8_BUNDLE --text book.txt

Prints bytes per token, the least milliseconds of a decode step at full depth for 1 and 8 rows with 256, 2,048 and 8,192
tokens (the last one of the context less the steps), in rounds that alternate between the bundles, and the mean KL
divergence and the perplexity of a text's tokens. The entries that the steps attend to are copies of one row's; they
cost what others do. docs/benchmarks.md quotes these figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import dynexport
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.model import Model

ROUNDS, STEPS, CHUNK = 4, 6, 256


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs=2, metavar="BUNDLE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[256, 2048, 8192])
    parser.add_argument("--window", type=int, default=1024, help="tokens of the text, one window")
    options = parser.parse_args()
    models = [dynexport.load(path, threads=options.threads) for path in options.bundles]
    for path, model in zip(options.bundles, models, strict=True):
        print(f"{path}: {_bytes_per_token(model)} bytes per token")
    for rows in options.rows:
        for context in options.contexts:
            first, second = _least(models, rows, min(context, models[0].bundle.manifest.model.max_length))
            print(f"{rows} rows, context {context}: {first:.2f} ms, {second:.2f} ms, {first / second:.2f}x")
    ids = np.array(models[0].text.encode(options.text.read_text())[: options.window])
    print("mean KL {:.3g}, perplexity {:.4g} and {:.4g}".format(*_quality(models, ids)))


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
    prompt = np.random.default_rng(0).integers(0, executor.manifest.model.vocab_size, min(tokens, CHUNK))
    executor.prefill(cache, [prompt] * rows, depth=executor.manifest.full)
    for buffer in cache.buffers.values():
        for start in range(len(prompt), tokens, len(prompt)):
            count = min(len(prompt), tokens - start)
            buffer[:, :, start : start + count] = buffer[:, :, :count]
    cache.lengths[:] = cache.positions[:] = tokens
    return cache


def _quality(models: Sequence[Model], ids: np.ndarray) -> tuple[float, float, float]:
    """Return the mean KL(first || second) and both perplexities of a text, int64 [tokens], run as one prompt."""
    first, second = (_log_probabilities(model.executor, ids) for model in models)
    places = np.arange(len(ids) - 1)
    divergence = (np.exp(first) * (first - second)).sum(axis=1).mean()
    perplexities = [float(np.exp(-found[places, ids[1:]].mean())) for found in (first, second)]
    return float(divergence), perplexities[0], perplexities[1]


def _log_probabilities(executor: Executor, ids: np.ndarray) -> np.ndarray:
    cache = executor.full_cache(1, len(ids))
    wanted = [np.arange(len(ids) - 1)]
    (logits,) = executor.prefill(cache, [ids], depth=executor.manifest.full, chunk=CHUNK, logits_at=wanted)
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
