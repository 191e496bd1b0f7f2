"""Check a batch before any of it runs: rows, tokens, logits indices, forced decisions, depths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dynexport.runtime.bundle.checks import (
    checked_count,
    checked_decisions,
    checked_ids,
    checked_kind,
    checked_list,
    is_integer,
    shown,
)
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Phase
from dynexport.runtime.execution.batch import Batch, EvenChunks, Tokens
from dynexport.runtime.execution.calls import Part
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.kv_cache import KvCache

Array = np.ndarray


def checked_chunk(chunk: Any) -> int | EvenChunks:
    """Return a number of tokens, or chunks by position. Raises DynexportError for anything else."""
    return chunk if isinstance(chunk, EvenChunks) else checked_count("chunk", chunk)


def checked_parts(cache: KvCache, batch: Batch, reader: DecisionReader, bundle: Path) -> list[Part]:
    """Return the checked part of each row of a batch.

    Args:
        cache: the cache that the batch runs on.
        batch: the batch as the caller gave it.
        reader: checks forced decisions.
        bundle: the bundle's path, for error messages.

    Raises:
        DynexportError: as for ``Executor.run``.
    """
    rows = [cache.checked(row) for row in checked_list("rows", batch.rows, "rows")]
    if len(set(rows)) < len(rows):
        raise DynexportError(f"rows: expected each row of a batch once, found {shown(rows)}")
    if batch.phase not in get_args(Phase):
        raise DynexportError(f"phase: expected {' or '.join(get_args(Phase))}, found {shown(batch.phase)}")
    if isinstance(batch.logits, str) and batch.logits not in ("last", "all"):
        raise DynexportError(f"logits: expected last, all or places, found {shown(batch.logits)}")
    checked_chunk(batch.chunk)
    given = checked_for_rows("prompts" if batch.phase == "prompt" else "tokens", batch.tokens, len(rows))
    forced = [None] * len(rows) if batch.forced is None else checked_for_rows("forced", batch.forced, len(rows))
    wanted = [batch.logits] * len(rows)
    if not isinstance(batch.logits, str):
        wanted = checked_for_rows("logits_at", batch.logits, len(rows))
    tokens = [_ids(cache, batch.phase, row, ids) for row, ids in zip(rows, given, strict=True)]
    return [
        Part(row, ids, _places(places, len(ids)), _forced(wish, len(ids), reader, bundle))
        for row, ids, places, wish in zip(rows, tokens, wanted, forced, strict=True)
    ]


def _ids(cache: KvCache, phase: Phase, row: int, tokens: Tokens) -> Array:
    """Return a row's tokens as int64 [n], checked to fit the row."""
    ids = checked_ids("prompt" if phase == "prompt" else "tokens", tokens, cache.manifest.model.vocab_size)
    if not len(ids) and phase == "prompt":
        raise DynexportError("prompt: expected at least one token, found none")
    cache.check_room(row, len(ids), is_prompt=phase == "prompt")
    return ids


def _forced(wish: Array | None, count: int, reader: DecisionReader, bundle: Path) -> Array:
    """Return the caller's decisions for a row's tokens, int64 [R, count]; -1 leaves one to its router."""
    rows = reader.rows
    if wish is None:
        return np.full((rows, count), -1, np.int64)
    if not rows:
        raise DynexportError(f"forced: expected None, as {bundle} has no routers; found decisions")
    decisions = checked_decisions("forced", wish, (rows, count))
    reader.check_forced(decisions)
    return decisions


def by_depth(parts: list[Part], batch: Batch) -> Iterator[tuple[Depth, list[Part]]]:
    """Group the rows that have tokens by depth, rows ascending within a group."""
    several = isinstance(batch.depth, Sequence) and not isinstance(batch.depth, str)
    depths: list[Any] = checked_for_rows("depth", batch.depth, len(parts)) if several else [batch.depth] * len(parts)
    for depth in {id(depth): depth for depth in depths}.values():
        checked_kind("depth", depth, Depth, "one of Bundle.depth")
        group = [part for part, its in zip(parts, depths, strict=True) if its is depth and part.left]
        if group:
            yield depth, sorted(group, key=lambda part: part.row)


def checked_for_rows(name: str, values: Any, rows: int) -> list[Any]:
    """Return a list with one value per row. Raises DynexportError for any other number of values."""
    found = checked_list(name, values, f"{rows}, one a row")
    if len(found) != rows:
        raise DynexportError(f"{name}: expected {rows}, one for each row, found {len(found)}")
    return found


def _places(wanted: Any, tokens: int) -> Array:
    """Return the ascending indices of the tokens that get logits, int64 [k]."""
    if isinstance(wanted, str):
        return np.arange(tokens) if wanted == "all" else np.arange(tokens)[-1:]
    found = [checked_count("logits_at", place, 0, tokens - 1) for place in checked_list("logits_at", wanted, "places")]
    if sorted(set(found)) != found:
        raise DynexportError(f"logits_at: expected ascending places, found {shown(found)}")
    return np.array(found, np.int64)


def is_plain(rows: list[Any], tokens: list[Any], depths: Sequence[Depth]) -> bool:
    """Return whether the rows are adjacent, in order, and all at one depth, so that one call runs them."""
    return (
        is_integer(rows[0])
        and len(tokens) == len(rows)
        and isinstance(depths, Sequence)
        and len(depths) == len(rows)
        and isinstance(depths[0], Depth)
        and rows == list(range(rows[0], rows[0] + len(rows)))
        and all(depth is depths[0] for depth in depths)
    )


__all__ = ["by_depth", "checked_for_rows", "checked_parts", "is_plain"]
