"""Data classes for a batch of rows, one call of a program, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dynexport.runtime.bundle.checks import checked_count
from dynexport.runtime.bundle.manifest import Depth, Phase
from dynexport.runtime.execution.decisions import Decisions

Array = np.ndarray
Tokens: TypeAlias = Sequence[int] | Array
Wanted: TypeAlias = Literal["last", "all"] | Sequence[Array]
# Longer prompts run chunk by chunk: the attention scores of a chunk against all earlier entries take the most memory.
CHUNK = 1024
# Position at which a chunk of the same time has half as many tokens as at 0 (docs/benchmarks.md, "Serving").
_HALF = 1500
# Kernels work on blocks of this many tokens.
_BLOCK = 8


@dataclass(frozen=True)
class EvenChunks:
    """Chunks of a prompt that take about as long as each other.

    A token attends to all tokens before it, so a later chunk has fewer tokens. A chunk's size depends on its position
    only, so that prompts are cut at the same places whatever else runs.

    Attributes:
        first: number of tokens of a prompt's first chunk.

    Raises:
        DynexportError: for a number of another type, or below 1.
    """

    first: int

    def __post_init__(self) -> None:
        checked_count("chunk", self.first)

    def size(self, position: int) -> int:
        """Return the number of tokens of the chunk that begins at a position."""
        even = self.first / (1 + position / _HALF)
        return min(self.first, max(_BLOCK, round(even / _BLOCK) * _BLOCK))


@dataclass(frozen=True)
class Batch:
    """New tokens for some rows of a cache; each row has zero or more of them.

    Attributes:
        rows: numbers of the cache's rows, each at most once, in any order; results come in this order.
        tokens: token ids, int64 [n] per row.
        phase: "prompt" for tokens of a prompt, "decode" for generated tokens.
        depth: one depth for all rows, or one per row.
        logits: which tokens get logits: "last" for each row's last token, "all", or int64 [k] per row with ascending
            indices into its tokens.
        forced: int64 [R, n] per row, decisions that replace the routers'; -1 leaves one to its router. None leaves all
            of them to the routers.
        chunk: the largest number of a row's tokens in one call, or chunks by position; the program's own limits may
            lower it.
    """

    rows: Sequence[int]
    tokens: Sequence[Tokens]
    phase: Phase
    depth: Depth | Sequence[Depth]
    logits: Wanted = "last"
    forced: Sequence[Array] | None = None
    chunk: int | EvenChunks = CHUNK


@dataclass(frozen=True)
class StepResult:
    """The result of a run, in the order of the batch's rows.

    Attributes:
        logits: float32 [k, vocab] per row, for the tokens that ``Batch.logits`` asks for.
        entries: int64 [places, rows], new entries of every cache. A skipped token can also have an entry.
        decisions: the routers' decisions for every row's new tokens; None for a bundle without routers.
    """

    logits: list[Array]
    entries: Array
    decisions: list[Decisions] | None


@dataclass(slots=True)
class Call:
    """The inputs of one call of a program: right-padded tokens for a contiguous range of a cache's rows.

    Attributes:
        rows: the range of rows; rows without tokens are computed as well, but add no entry.
        ids: token ids, int64 [B, S].
        counts: int64 [B], number of tokens of each row.
        active: bool [layers], true for layers that run.
        wanted: int64 [B, K], indices among the S tokens whose logits are returned; K may be 0.
        forced: int64 [R, B, S], forced decisions or -1; R is 0 without routers.
        is_prompt: true for tokens of a prompt, false for generated tokens.
        lasting: true returns the logits as an array of their own; false may return memory that the cache's next call
            overwrites.
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
    """The result of one call.

    Attributes:
        logits: float32 [B, K, vocab].
        entries: int64 [places, B], new entries of every cache.
        decisions: one per row, without padding; None for a bundle without routers whose cache does not record.
    """

    logits: Array
    entries: Array
    decisions: list[Decisions] | None


__all__ = ["CHUNK", "Batch", "Call", "CallResult", "StepResult", "Tokens", "Wanted"]
