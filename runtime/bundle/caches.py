"""The manifest's sections on KV caches and on the limits of one call."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dynexport.runtime.bundle.graphs import ARRAY_TYPES, ArrayType, Part, Size


class CachePart(Part):
    """One buffer of a cache.

    Attributes:
        input: name of the graph input that reads the buffer, in every graph that lists this place.
        output: name of the graph output that writes it; bound to the same memory as the input.
        dtype: element type, one of those that inputs and outputs have.
        shape: B is the number of rows, M the number of slots unless the graph fixes it; the rest are numbers.
        scale: for int8 keys and values, the name of their scale: an initializer, float32 [1, kv_heads, 1, head_dim], of
            every graph that has the cache. An entry x is stored as clip(round_half_even(x / scale), -128, 127), and
            stands for its integer times the scale. None: entries are stored as they are.
    """

    input: str
    output: str
    dtype: ArrayType
    shape: tuple[Size | Literal["B", "M"], ...]
    scale: str | None = None

    @property
    def array_type(self) -> type[np.generic]:
        """The numpy type of its arrays; bfloat16, which numpy lacks, is stored as uint16 with the same bits."""
        return ARRAY_TYPES[self.dtype]


class Cache(Part):
    """The KV cache of one place: a layer's, or a hop's where ``routing.places`` is "hops".

    For rows of ``tokens`` tokens, a buffer has ``min(tokens, most) * per_token + slack`` slots, unless its shape fixes
    the number. Entries are in slots 0..length-1; later slots are never read.

    Attributes:
        place: the index of the layer or hop; every place from 0 up has exactly one cache.
        parts: "key" and "value" [B, kv_heads, M, head_dim]; empty for a layer without attention, whose entries are
            counted, but not stored. Some caches also have "position" int64 [B, M], the
            original position of every entry, and "step" int64 [B, M], the hop that wrote it.
        most: most entries of a row, if that can be fewer than its tokens; beyond it the cache is full.
        per_token: most entries that one token may write.
        slack: extra slots at the end that a call may overwrite; their content is never read.
    """

    place: Annotated[int, Field(ge=0, lt=1 << 31)]
    parts: dict[str, CachePart]
    most: Size | None = None
    per_token: Size = 1
    slack: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class CacheText(Part):
    """The text that the scales of int8 caches were measured on.

    Attributes:
        source: "built-in" for dynexport's own text, "given" for one that the user gave.
        tokens: number of its tokens that were used.
        sha256: hash of these token ids, as little-endian int64.
    """

    source: Literal["built-in", "given"]
    tokens: Size
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Limits(Part):
    """The limits of one call of a program; None means no limit.

    Rows with at most one new token each may always share a call, whatever their caches hold.

    Attributes:
        rows: most rows of a call.
        prompt: most new tokens of a row.
        filled: most new tokens of a row when any cache of the call holds entries.
        tokens: most new tokens of all rows together.
        logits: most positions of a row that logits are returned for.
        together: whether several rows may share a call when one of them has more than one new token: "always"; "empty",
            only if the caches of all rows are empty; "never".
        whole_prompts: whether a prompt must run in one call, because its tokens compete for a layer's capacity, later
            tokens included.
        compete: whether all tokens of a call compete for a layer's capacity, so that a row's results depend on the
            other rows.
    """

    rows: Size | None = None
    prompt: Size | None = None
    filled: Size | None = None
    tokens: Size | None = None
    logits: Size | None = None
    together: Literal["always", "empty", "never"] = "empty"
    whole_prompts: bool = False
    compete: bool = False
