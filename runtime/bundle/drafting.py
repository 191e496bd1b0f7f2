"""The manifest's section on drafts: who drafts tokens that the full model verifies, and how many."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part
from dynexport.runtime.bundle.routing import Layers

MOST_DRAFTS = 64
MOST_NGRAMS = 1 << 18


class Ngrams(Part):
    """A table that says which token is likeliest to follow some tokens, as ``dynexport calibrate --ngrams`` learned it.

    Attributes:
        file: its file, one of ``files`` ("The n-gram table").
        entries: number of contexts that are stored.
        tokens: number of tokens of the text that it was learned from.
        acceptance: share of the drafts of a fifth of the text, not learned from, that were right; 0 if there were none.
    """

    file: str
    entries: Annotated[int, Field(ge=1, le=MOST_NGRAMS)]
    tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    acceptance: Annotated[float, Field(ge=0, le=1)]


class Drafting(Part):
    """How tokens are drafted where a user does not say, as ``dynexport calibrate`` found it.

    Attributes:
        most: most drafts of a row in a step.
        keep: layers that draft, ascending: those of a declared depth, or others where one graph runs any layers. None:
            no layers draft; what followed the last tokens before is looked up, in the text and then in ``ngrams``.
        gain: time of decoding without drafts / with them on the text of the measurement; None before it was measured.
        ngrams: a table of short token sequences and what follows them; None if there is none.
    """

    most: Annotated[int, Field(ge=1, le=MOST_DRAFTS)]
    keep: Layers | None = None
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    ngrams: Ngrams | None = None


__all__ = ["MOST_DRAFTS", "MOST_NGRAMS", "Drafting", "Ngrams"]
