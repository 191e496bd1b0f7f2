"""Lengths that a verification reaches within its budget, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dynexport.exporter.families import read_architecture
from dynexport.exporter.reference.rounding import is_rounded
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.batch import CHUNK

# FLOPs of one pass of the reference over all long rows. Two cores run 30 to 60 GFLOP/s: up to half a minute for PyTorch
# and about the same for the engine. Golden vectors delay a conversion, so they have a tenth of the budget.
BUDGET, GOLDEN_BUDGET = 1e12, 1e11
# Bytes of attention scores; PyTorch holds three float32 values per head and pair of positions at once.
_MEMORY, _BYTES_PER_SCORE = 1 << 30, 3 * 4
# Other checks already run rows shorter than this.
_SHORTEST = 96
# The last tokens of a row are decode steps, so that decoding reaches the same length as prefill.
STEPS = 4
# Tokens of a row after the last edge that it reaches.
_BEYOND = 16
# Limits of the compared logits: values in a check, bytes in golden vectors; (minimum, maximum) of positions.
_NUMBERS, _GOLDEN_BYTES = 1 << 22, 1 << 22
_POSITIONS, _GOLDEN_POSITIONS = (16, 512), (8, 64)
# The same below fp32. Limits of the largest error were measured over this number of positions; more positions have a
# larger maximum. For PyTorch's float16 on the untrained dense model of tests/conformance, six rows of 256 tokens, the
# error is at most 0.084 at 99 % of the positions and 0.16 at the worst, anywhere in the row.
_ROUNDED_POSITIONS = (16, 64)
# Not checked for a single graph whose layers have less capacity than tokens.
COMPETING = "other batches and other prefill chunks, as the tokens of a call compete for the capacity of layers"
# Length of the row for caches of paths that have no limit of their own.
_TOKENS_OF_PATHS = 24


@dataclass(frozen=True)
class LongRow:
    """A row that is as long as the budget allows.

    Attributes:
        length: number of tokens.
        prompt: number of prompt tokens; each later token is a decode step.
        positions: ascending positions whose logits are compared.
    """

    length: int
    prompt: int
    positions: tuple[int, ...]


def row_limit(manifest: Manifest) -> int:
    """Return the most tokens that a row can have for any routing: where a full cache is an error, none fills."""
    context = manifest.model.max_length
    return min(context, _most_entries(manifest)) if _full_is_error(manifest) else context


def _full_is_error(manifest: Manifest) -> bool:
    return isinstance(manifest.routing, LayerRouting) and manifest.routing.overflow == "error"


def _most_entries(manifest: Manifest) -> int:
    """Return the number of entries that every cache of a row can hold."""
    return min((cache.most for cache in manifest.caches if cache.most is not None), default=manifest.model.max_length)


def edges(manifest: Manifest) -> dict[str, int]:
    """Return description -> first length at which a row is processed differently; the last is the context."""
    context = manifest.model.max_length
    windows = {size for size in read_architecture(manifest.source.config).windows if size is not None}
    found = {f"the attention window of {size}": size + 1 for size in sorted(windows)}
    if not manifest.limits.whole_prompts:
        found[f"prompts in chunks of {CHUNK}"] = CHUNK + 1
    return {name: size for name, size in found.items() if size < context} | {f"the context of {context}": context}


def long_row(manifest: Manifest, rows: int, budget: float) -> LongRow | None:
    """Return the longest row within a budget; None where other checks are as long.

    Args:
        manifest: the bundle's manifest.
        rows: number of such rows that the reference runs.
        budget: FLOPs for all of them; infinite for the whole context.
    """
    limit = row_limit(manifest)
    if manifest.limits.whole_prompts:  # no chunks
        limit = min(limit, (manifest.limits.prompt or limit) + STEPS)
    most = min(limit, affordable(manifest, rows, budget))
    if most < min(limit, _SHORTEST):
        return None
    reached = [size for size in edges(manifest).values() if size <= most]
    length = min(most, max(reached) + _BEYOND) if reached else most
    return _row(manifest, length, _NUMBERS // manifest.model.vocab_size, _most_positions(manifest))


def golden_long_row(manifest: Manifest) -> LongRow | None:
    """Return the long row of golden vectors, with fewer positions to keep the bundle small."""
    row = long_row(manifest, 1 + is_rounded(manifest), GOLDEN_BUDGET)
    if row is None:
        return None
    return _row(manifest, row.length, _GOLDEN_BYTES // (4 * manifest.model.vocab_size), _GOLDEN_POSITIONS)


def full_row(manifest: Manifest, budget: float) -> LongRow | None:
    """Return the row that fills the caches when all its tokens run, and exceeds them where that is allowed."""
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
    """Return whether one token more than this row is an error."""
    return _full_is_error(manifest) and row.length < manifest.model.max_length


def not_reached(manifest: Manifest, row: LongRow | None, full: LongRow | None, shortest: int) -> tuple[str, ...]:
    """Return what no row reached, one phrase each.

    Args:
        manifest: the bundle's manifest.
        row: the long row; None if there was none.
        full: the row that fills the caches; None if there was none.
        shortest: length of the longest row of the other checks.
    """
    reached = max(shortest, 0 if row is None else row.length)
    missed = [f"{name} (rows had up to {reached} tokens)" for name, size in edges(manifest).items() if size > reached]
    if manifest.limits.compete:
        missed.append(COMPETING)
    if full is None and isinstance(manifest.routing, LayerRouting):
        missed.append(f"routed caches that are full ({_most_entries(manifest)} entries)")
    return tuple(missed)


def affordable(manifest: Manifest, rows: int, budget: float) -> int:
    """Return the length of the longest row that fits the FLOPs budget and the memory of attention scores.

    Matrix products cost two FLOPs per weight and token; attention four per channel and pair of tokens.
    """
    if math.isinf(budget):
        return manifest.model.max_length
    model = manifest.model
    runs = model.layers
    if isinstance(manifest.routing, PathRouting):
        in_one_graph = manifest.program("prompt", manifest.full).set is None
        runs = manifest.routing.hops * (model.layers if in_one_graph else 1)
    heads, products = model.heads * runs, manifest.cost.layer_flops * runs
    if model.heads_of_layers:
        heads, products = sum(model.heads_of_layers), sum(manifest.cost.flops_of_layers)
    squared, linear = 4 * model.head_dim * heads, products
    within = (math.sqrt(linear**2 + 4 * squared * budget / rows) - linear) / (2 * squared)
    return max(1, int(min(within, math.sqrt(_MEMORY / (_BYTES_PER_SCORE * model.heads)))))


def _most_positions(manifest: Manifest) -> tuple[int, int]:
    return _POSITIONS if manifest.precision == "fp32" and not is_rounded(manifest) else _ROUNDED_POSITIONS


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
