"""A batch of rows with new tokens, and what a run makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dynexport.runtime.bundle.manifest import Depth, Phase
from dynexport.runtime.execution.decisions import Decisions

Array = np.ndarray
Tokens: TypeAlias = Sequence[int] | Array
Wanted: TypeAlias = Literal["last", "all"] | Sequence[Array]
# Longer prompts go in pieces: the scores of a piece against all entries before it are what takes memory.
CHUNK = 1024


@dataclass(frozen=True)
class Batch:
    """New tokens of some rows of a cache; a row may have any number of them, or none.

    Attributes:
        rows: of the cache, each once, in any order; results come in this order.
        tokens: int64 [n] per row.
        phase: "prompt" for tokens that were given, "decode" for generated ones.
        depth: of all rows, or one per row.
        logits: "last", of each row's last token; "all"; or int64 [k] per row, ascending places among its tokens.
        forced: int64 [R, n] per row, decisions to make instead of the routers'; -1 leaves one to its router. None
            leaves all.
        chunk: tokens of a row that a call may have at most; fewer where the program takes fewer.
    """

    rows: Sequence[int]
    tokens: Sequence[Tokens]
    phase: Phase
    depth: Depth | Sequence[Depth]
    logits: Wanted = "last"
    forced: Sequence[Array] | None = None
    chunk: int = CHUNK


@dataclass(frozen=True)
class StepResult:
    """What a run came to, in the order of the batch's rows.

    Attributes:
        logits: float32 [k, vocab] per row, of the tokens that were asked for.
        entries: int64 [places, rows], new entries of every cache. A skipped token may have left one all the same.
        decisions: what routers decided of every row's new tokens; None where there are no routers.
    """

    logits: list[Array]
    entries: Array
    decisions: list[Decisions] | None


@dataclass(slots=True)
class Call:
    """What one call of a program is given: a right-padded range of a cache's rows.

    Attributes:
        rows: of the cache, contiguous; those without tokens are computed along and leave no entry.
        ids: int64 [B, S].
        counts: int64 [B], tokens of each row.
        active: bool [layers], those that run.
        wanted: int64 [B, K], places among the S tokens whose logits are wanted.
        forced: int64 [R, B, S]; R is 0 where there are no routers.
        is_prompt: whether the tokens were given.
        lasting: whether the logits are an array of their own; or memory that the cache's next call writes over.
    """

    rows: slice
    ids: Array
    counts: Array
    active: Array
    wanted: Array
    forced: Array
    is_prompt: bool
    lasting: bool = True


@dataclass(slots=True)
class CallResult:
    """What one call gave.

    Attributes:
        logits: float32 [B, K, vocab].
        entries: int64 [places, B].
        decisions: of every row's tokens, padding left out; None where there are no routers and nobody records.
    """

    logits: Array
    entries: Array
    decisions: list[Decisions] | None


__all__ = ["CHUNK", "Batch", "Call", "CallResult", "StepResult", "Tokens", "Wanted"]
