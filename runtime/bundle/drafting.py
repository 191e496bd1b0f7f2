"""The manifest's section on drafts: who drafts tokens that the full model verifies, and how many."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dynexport.runtime.bundle.graphs import Part
from dynexport.runtime.bundle.routing import Layers

MOST_DRAFTS = 64


class Drafting(Part):
    """How tokens are drafted where a user does not say, as ``dynexport calibrate --speculate`` measured it.

    Attributes:
        most: most drafts of a row in a step.
        keep: layers that draft, ascending: those of a declared depth, or others where one graph runs any layers. None:
            no layers draft; what followed the last tokens before is looked up.
        gain: time of decoding without drafts / with them on the text of the measurement.
    """

    most: Annotated[int, Field(ge=1, le=MOST_DRAFTS)]
    keep: Layers | None = None
    gain: Annotated[float, Field(gt=0, allow_inf_nan=False)]


__all__ = ["MOST_DRAFTS", "Drafting"]
