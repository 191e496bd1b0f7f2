"""The values of a bundle that stores its matrices in a type of 16 bits."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
# Routers, and the stacked biases of experts: they stay float32.
_ROUTER = re.compile(r"\.(mlp\.gate|router|shared_expert_gate)\.weight$|_proj_bias$")


class HalfWeights:
    """The matrices of a bundle that stores them in a type of 16 bits, all but routers and the stacks of experts."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype

    def stored(self, name: str, weight: FloatArray) -> FloatArray:
        """Return the bundle's values of one parameter, as ``DequantisedWeights.stored``; vectors stay float32."""
        kept = weight.ndim != 2 or _ROUTER.search(name)
        return weight if kept else weight.astype(self._dtype).astype(np.float32)


__all__ = ["HalfWeights"]
