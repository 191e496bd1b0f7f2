"""How far a verification reaches: past windows, full caches and pieces of prompts; what it costs and leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dynexport.exporter.families import read_architecture
from dynexport.exporter.reference.dequantised import is_quantised
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.batch import CHUNK

# FLOPs of one pass of the reference over all long rows. Two cores do 30 to 60 billion a second: up to half a minute for
# PyTorch and about as much for the engine. Golden vectors hold up a conversion, and have a tenth.
BUDGET, GOLDEN_BUDGET = 1e12, 1e11
# Bytes of attention's scores, of which PyTorch has three at once for every head and pair of positions.
_MEMORY, _BYTES_PER_SCORE = 1 << 30, 3 * 4
# Shorter rows are as long as those that other checks run.
_SHORTEST = 96
# The last tokens of a row are fed one by one, so that decoding reaches as far as prompts do.
STEPS = 4
# Tokens after the last edge that a row reaches.
_BEYOND = 16
# Logits that are compared: numbers in a check, bytes in golden vectors; and positions, whatever they cost.
_NUMBERS, _GOLDEN_BYTES = 1 << 22, 1 << 22
_POSITIONS, _GOLDEN_POSITIONS = (16, 512), (8, 64)
# Limits of the largest error were measured over so many positions; where arithmetic is rounded, more have a larger one.
# PyTorch's own float16 on the untrained dense model of tests/conformance, six rows of 256 tokens: 99 of 100 positions
# are off by at most 0.084 and the worst of all by 0.16, whatever their place in the row.
_ROUNDED_POSITIONS = (16, 64)
# What nothing goes to where a single graph's layers have no room for all.
COMPETING = "rows beside others and prompts in other pieces, as tokens that run together compete for layers"
# What a cache of a path fills with, where it has no limit of its own.
_TOKENS_OF_PATHS = 24


@dataclass(frozen=True)
class LongRow:
    """One row that goes as far as is worth its cost.

    Attributes:
        length: tokens.
        prompt: tokens that are given as prompt; those after them are fed one by one.
        positions: tokens whose logits are compared, ascending.
    """

    length: int
    prompt: int
    positions: tuple[int, ...]


def row_limit(manifest: Manifest) -> int:
    """Tokens that a row may have, whatever routers decide: where a full cache is an error, none may be full."""
    context = manifest.model.max_length
    return min(context, _most_entries(manifest)) if _full_is_error(manifest) else context


def _full_is_error(manifest: Manifest) -> bool:
    return isinstance(manifest.routing, LayerRouting) and manifest.routing.overflow == "error"


def _most_entries(manifest: Manifest) -> int:
    """Entries that a row may have in every cache."""
    return min((cache.most for cache in manifest.caches if cache.most is not None), default=manifest.model.max_length)


def edges(manifest: Manifest) -> dict[str, int]:
    """Lengths from which on something else happens to a row, by what it is; the last is the whole context."""
    context = manifest.model.max_length
    windows = {size for size in read_architecture(manifest.source.config).windows if size is not None}
    found = {f"the attention window of {size}": size + 1 for size in sorted(windows)}
    if not manifest.limits.whole_prompts:
        found[f"prompts in pieces of {CHUNK}"] = CHUNK + 1
    return {name: size for name, size in found.items() if size < context} | {f"the context of {context}": context}


def long_row(manifest: Manifest, rows: int, budget: float) -> LongRow | None:
    """The row to run, or None where none is worth it.

    Args:
        rows: how many such rows the reference runs.
        budget: FLOPs for all of them; infinite for the whole context.
    """
    limit = row_limit(manifest)
    if manifest.limits.whole_prompts:  # they cannot be cut
        limit = min(limit, (manifest.limits.prompt or limit) + STEPS)
    most = min(limit, affordable(manifest, rows, budget))
    if most < min(limit, _SHORTEST):
        return None
    reached = [size for size in edges(manifest).values() if size <= most]
    length = min(most, max(reached) + _BEYOND) if reached else most
    return _row(manifest, length, _NUMBERS // manifest.model.vocab_size, _most_positions(manifest))


def golden_long_row(manifest: Manifest) -> LongRow | None:
    """The same for golden vectors: one row, and logits that do not make the bundle large."""
    row = long_row(manifest, 1 + is_quantised(manifest), GOLDEN_BUDGET)
    if row is None:
        return None
    return _row(manifest, row.length, _GOLDEN_BYTES // (4 * manifest.model.vocab_size), _GOLDEN_POSITIONS)


def full_row(manifest: Manifest, budget: float) -> LongRow | None:
    """The row, all of whose tokens run, that fills the caches of routed layers and asks for more, where it may."""
    context = manifest.model.max_length
    if manifest.limits.compete or manifest.routing is None:
        return None
    length = min(context, _TOKENS_OF_PATHS)
    if isinstance(manifest.routing, LayerRouting):
        most = _most_entries(manifest)
        length = most if _full_is_error(manifest) else min(context, most + STEPS)
    if length > affordable(manifest, 1, budget):
        return None
    return _row(manifest, length, _NUMBERS // manifest.model.vocab_size, _most_positions(manifest))


def full_is_refused(manifest: Manifest, row: LongRow) -> bool:
    """Whether one token more than such a row has is an error."""
    return _full_is_error(manifest) and row.length < manifest.model.max_length


def not_reached(manifest: Manifest, row: LongRow | None, full: LongRow | None, shortest: int) -> tuple[str, ...]:
    """What no row went to, one phrase each.

    Args:
        row, full: what was run.
        shortest: tokens that other checks ran.
    """
    reached = max(shortest, 0 if row is None else row.length)
    missed = [f"{name} (rows had up to {reached} tokens)" for name, size in edges(manifest).items() if size > reached]
    if manifest.limits.compete:
        missed.append(COMPETING)
    if full is None and isinstance(manifest.routing, LayerRouting):
        missed.append(f"routed caches that are full ({_most_entries(manifest)} entries)")
    return tuple(missed)


def affordable(manifest: Manifest, rows: int, budget: float) -> int:
    """The longest row that PyTorch runs within a budget of FLOPs, and within the memory for attention's scores.

    Products cost two FLOPs for each weight and token; attention four for each channel and pair of tokens.
    """
    if math.isinf(budget):
        return manifest.model.max_length
    model = manifest.model
    runs = model.layers
    if isinstance(manifest.routing, PathRouting):
        in_one_graph = manifest.program("prompt", manifest.full).set is None
        runs = manifest.routing.hops * (model.layers if in_one_graph else 1)
    squared, linear = 4 * model.heads * model.head_dim * runs, manifest.cost.layer_flops * runs
    within = (math.sqrt(linear**2 + 4 * squared * budget / rows) - linear) / (2 * squared)
    return max(1, int(min(within, math.sqrt(_MEMORY / (_BYTES_PER_SCORE * model.heads)))))


def _most_positions(manifest: Manifest) -> tuple[int, int]:
    return _POSITIONS if manifest.precision == "fp32" else _ROUNDED_POSITIONS


def _row(manifest: Manifest, length: int, count: int, bounds: tuple[int, int]) -> LongRow:
    prompt = max(1, length - STEPS)
    count = min(length, max(bounds[0], min(count, bounds[1])))
    spread = {int(place) for place in np.linspace(0, length - 1, count)}
    beside = {size + offset for size in edges(manifest).values() for offset in (-2, -1, 0)}
    wanted = spread | {place for place in beside if 0 <= place < length} | set(range(prompt - 1, length))
    return LongRow(length, prompt, tuple(sorted(wanted)))


__all__ = [
    "BUDGET",
    "COMPETING",
    "STEPS",
    "LongRow",
    "affordable",
    "edges",
    "full_is_refused",
    "full_row",
    "golden_long_row",
    "long_row",
    "not_reached",
    "row_limit",
]
