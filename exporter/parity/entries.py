"""Arithmetic checks of int8 KV caches: PyTorch attends to the entries that the bundle has stored.

A key near the middle between two integers may be rounded to either, and later layers amplify the step. So PyTorch takes
the stored integers. Then its logits must be those of the bundle within the limits of float32, and its own keys and
values must be within half a step of the stored ones: only so far does rounding to the nearest move a number. Around
ONNX Runtime's attention the tokens of one call attend to each other's unrounded keys and values; so the calls of the
run are given to PyTorch, too. Another pass without rounded keys and values measures what int8 caches cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dynexport.exporter.parity.cases import Prompt, replay, routes
from dynexport.exporter.parity.comparison import Measurement, absent, skips
from dynexport.exporter.parity.expected import Scope
from dynexport.exporter.parity.metrics import Metrics, compare_logits
from dynexport.exporter.parity.reach import row_limit
from dynexport.exporter.reference import Case, RowPaths, RowRoutes
from dynexport.exporter.reference.half_caches import GivenHalves
from dynexport.exporter.reference.int8_caches import GivenEntries, Scales
from dynexport.exporter.reference.rounding import attends_to_stored
from dynexport.exporter.reference.seen_entries import ALONE, IntArray
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Manifest
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

# In steps of the scale: half a step, and the limit of float32 for hidden states, 2e-4, of the 127 steps of the largest.
FURTHEST = 0.5 + 127 * 2e-4
# The limit of float32 for hidden states.
HALF_BEYOND = 2e-4
# Largest share of a layer's keys and values that may be beyond the range; SmolLM2 on another text: 0.3 %.
CLIPPED = 0.05
# Least integer, of 127, that the largest key and value of a layer must have: larger scales waste the range of int8.
USED = 32
_STEPS = 8


@dataclass(frozen=True)
class StoredEntries:
    """The model in PyTorch, to run on the entries that a bundle has stored.

    Attributes:
        weights: the model, with weights as the bundle rounds them.
        scales: the scales of the bundle's caches; None for float16.
    """

    weights: Weights
    scales: Scales | None

    def checks(self, executor: Executor, scope: Scope, ratios: Sequence[Depth], long: Prompt) -> Iterator[Measurement]:
        """Compare at every depth: prompts with decode steps in a batch, a conversation of two turns, and a long row.

        Args:
            executor: runs the bundle, with activations in float32.
            scope: inputs of the checks.
            ratios: the depths.
            long: the tokens of the long row; empty without one.
        """
        limit, prompts = row_limit(executor.manifest), scope.prompts
        half = max(1, limit // 2 - _STEPS)
        for depth in ratios:
            batch = _prompts_and_steps(prompts[: scope.generated], depth, limit)
            yield from self.compare(f"steps/{depth.name}", executor, batch)
            turns = _two_turns([prompts[-1][:half], prompts[0][:half]], depth)
            yield from self.compare(f"turns/{depth.name}", executor, turns)
            if scope.long is not None:
                case = Case(tuple(long), ((0, scope.long.prompt),), depth)
                yield from self.compare(f"long/{depth.name}", executor, [case], at=scope.long.positions)

    def compare(
        self, name: str, executor: Executor, cases: Sequence[Case], *, at: tuple[int, ...] = ()
    ) -> list[Measurement]:
        """Compare a run of the bundle with PyTorch on the entries that this run has stored, and the entries themselves.

        The third result, "kv_cache/..", compares it with PyTorch on unrounded keys and values.

        Routers decide in the bundle, and PyTorch takes their decisions.

        Args:
            name: name of the check.
            executor: runs the bundle, with activations in float32.
            cases: rows of one depth.
            at: positions whose logits are compared; empty means all.
        """
        cache = executor.full_cache(len(cases), max(len(case.tokens) for case in cases), record=True)
        logits = replay(executor, cases, cache=cache, at=at)
        decided: Sequence[RowRoutes | RowPaths] = routes(cache)
        if decided:
            cases = [
                replace(case, forced=row.decisions.astype(np.int64)) for case, row in zip(cases, decided, strict=True)
            ]
        rows, manifest = [_row(cache, row) for row in range(len(cases))], executor.manifest
        given: GivenEntries | GivenHalves
        if self.scales is None:
            given = GivenHalves([len(case.tokens) for case in cases], rows)
        else:
            given = GivenEntries(self.scales, _calls(cache, manifest), rows)
        strategy, skipped = strategies()[manifest.contract.strategy], skips(executor, cases[0].depth)
        unrounded = strategy.oracle(self.weights, manifest).answers(cases, at=at)
        quality = compare_logits([answer.logits for answer in unrounded], logits)
        measured = Measurement(f"kv_cache/{name}", "quality", quality, skipped)
        try:
            answers = strategy.oracle(self.weights.with_entries(given), manifest).answers(cases, at=at)
        except DynexportError as error:  # another number of entries than PyTorch makes
            return [absent(f"arithmetic/{name}", str(error)), absent(f"entries/{name}", str(error)), measured]
        metrics = compare_logits([answer.logits for answer in answers], logits)
        return [
            Measurement(f"arithmetic/{name}", "arithmetic", metrics, skipped),
            _of_halves(f"entries/{name}", given)
            if isinstance(given, GivenHalves)
            else _distances(f"entries/{name}", given),
            measured,
        ]


def _prompts_and_steps(prompts: Sequence[Prompt], depth: Depth, limit: int) -> list[Case]:
    """Return cases of some prompts, each continued by the same number of its own tokens as decode steps."""
    steps = min(_STEPS, limit - max(map(len, prompts)))
    return [
        Case(tuple(np.resize(prompt, len(prompt) + steps).tolist()), ((0, len(prompt)),), depth) for prompt in prompts
    ]


def _two_turns(prompts: Sequence[Prompt], depth: Depth) -> list[Case]:
    """Return one case: a prompt, its first tokens as decode steps, another prompt, and its first tokens."""
    tokens: list[int] = []
    prompted = []
    for prompt in prompts:
        prompted.append((len(tokens), len(tokens) + len(prompt)))
        tokens += [*prompt, *prompt[:_STEPS]]
    return [Case(tuple(tokens), tuple(prompted), depth)]


def _calls(cache: KvCache, manifest: Manifest) -> list[IntArray]:
    """Return for every row the number of the call that each token ran in, int64 [tokens], from the cache's log.

    Rows with several tokens run alone. Tokens that attend to stored entries only have ``ALONE``.
    """
    assert cache.logs is not None
    if attends_to_stored(manifest):
        return [np.full(sum(made.ran.shape[1] for made in log), ALONE) for log in cache.logs]
    sizes = [[made.ran.shape[1] for made in log] for log in cache.logs]
    return [np.repeat([ALONE if size == 1 else at for at, size in enumerate(row)], row) for row in sizes]


def _row(cache: KvCache, row: int) -> dict[int, tuple[Any, Any]]:
    """Return the entries of a row by place: keys and values, int8 or float16 [kv_heads, entries, cache_head_dim]."""
    found = {}
    for place, count in enumerate(cache.lengths[:, row].tolist()):
        if f"{place}.key" not in cache.buffers:
            continue  # a layer without attention
        key, value = (cache.buffers[f"{place}.{part}"][row, :, :count].copy() for part in ("key", "value"))
        found[place] = key, value
    return found


def _distances(name: str, given: GivenEntries) -> Measurement:
    shares = {layer: given.clipped[layer] / max(1, count) for layer, count in given.entries.items()}
    wrong = [*_too_far(given), *_out_of_range(shares), *_too_small(given)]
    metrics: Metrics = {
        "identical": not wrong,
        "differences": wrong,
        "furthest": max(given.furthest.values()),
        "clipped": max(shares.values()),
        "largest": list(given.largest.values()),
    }
    return Measurement(name, "exact", metrics)


def _of_halves(name: str, given: GivenHalves) -> Measurement:
    wrong = [
        f"layer {layer}: expected entries within half a float16 step, and {HALF_BEYOND:.0e} of the largest, of "
        f"PyTorch's keys and values, found one {beyond:.1e} beyond"
        for layer, beyond in sorted(given.furthest.items())
        if not beyond <= HALF_BEYOND
    ]
    metrics: Metrics = {"identical": not wrong, "differences": wrong, "furthest": max(given.furthest.values())}
    return Measurement(name, "exact", metrics)


def _too_far(given: GivenEntries) -> Iterator[str]:
    for layer, steps in sorted(given.furthest.items()):
        if not steps <= FURTHEST:
            yield (
                f"layer {layer}: expected entries within {FURTHEST:.3f} steps of PyTorch's keys and values, found "
                f"{steps:.3g}"
            )


def _out_of_range(shares: Mapping[int, float]) -> Iterator[str]:
    for layer, share in sorted(shares.items()):
        if share > CLIPPED:
            yield (
                f"layer {layer}: expected at most {CLIPPED:.0%} of keys and values beyond the range of int8, found "
                f"{share:.1%}; convert with a text like those that the model will read"
            )


def _too_small(given: GivenEntries) -> Iterator[str]:
    for part, largest in given.largest.items():
        layer, _, kind = part.partition(".")
        if given.entries[int(layer)] and largest < USED:
            yield f"layer {layer}: expected a largest {kind} of {USED}..127, found {largest}; its scales are too large"


__all__ = ["CLIPPED", "FURTHEST", "USED", "StoredEntries"]
