"""The KV caches of a bundle and what a call may have, in its manifest."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from dynexport.runtime.bundle.graphs import ARRAY_TYPES, ArrayType, Part, Size


class CachePart(Part):
    """One buffer of a cache.

    Attributes:
        input: its name in the graphs that list this place.
        output: the same, after the call; bound to the same memory.
        dtype: of its elements; one of those that inputs and outputs have.
        shape: B rows, then numbers; M slots, where the graph has no number there.
    """

    input: str
    output: str
    dtype: ArrayType
    shape: tuple[int | Literal["B", "M"], ...]

    @property
    def array_type(self) -> type[np.generic]:
        """What its arrays hold; bfloat16, which numpy lacks, as the same 16 bits."""
        return ARRAY_TYPES[self.dtype]


class Cache(Part):
    """The KV cache of one place: of the layer with that index; of the hop, where ``routing.places`` is "hops".

    A buffer has ``min(tokens, most) * per_token + slack`` slots for rows of ``tokens`` tokens, unless its shape has a
    number there. Entries stand in the slots 0..length-1; what is behind them is never read.

    Attributes:
        place: its number, 0 and up, each once.
        parts: "key" and "value" [B, kv_heads, M, head_dim]; some have "position" int64 [B, M], the original
            position of every entry, and "step" int64 [B, M], the hop that made it.
        most: entries that a row may have, where that is fewer than its tokens; a further token finds the cache full.
        per_token: entries that a token may make.
        slack: slots behind the entries that a call may write, and nobody reads.
    """

    place: Annotated[int, Field(ge=0)]
    parts: dict[str, CachePart]
    most: Size | None = None
    per_token: Size = 1
    slack: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


class Limits(Part):
    """What one call of a program may have; None stands for any number.

    Rows that have one token each, or none, share a call whatever their caches hold.

    Attributes:
        rows: most rows.
        prompt: most new tokens of a row.
        filled: most new tokens of a row where a cache of the call holds entries.
        tokens: most new tokens of all rows together.
        logits: most logits of a row.
        together: whether rows may share a call in which one has more than one token: "always"; "empty", where the
            caches of all rows are empty; "never".
        whole_prompts: whether tokens of a prompt compete for layers, later ones too: a prompt is one call, never cut.
        compete: whether tokens of a call compete for room in layers: what a row gives depends on the others there.
    """

    rows: Size | None = None
    prompt: Size | None = None
    filled: Size | None = None
    tokens: Size | None = None
    logits: Size | None = None
    together: Literal["always", "empty", "never"] = "empty"
    whole_prompts: bool = False
    compete: bool = False
