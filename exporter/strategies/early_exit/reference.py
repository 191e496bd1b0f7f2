"""An independent definition of early exit for the reference: which tokens run in which layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray


def early_exit_runs(
    prompted: Sequence[tuple[int, int]],
    length: int,
    exit_after: int,
    layers: int,
    *,
    prompt: Literal["full", "exit"] = "full",
) -> NDArray[np.bool_]:
    """Return which tokens run in which layer, bool [layers, length].

    Args:
        prompted: (start, stop) of every turn's prompt; all other tokens are generated.
        length: number of tokens of the sequence.
        exit_after: number of layers that a generated token runs.
        layers: number of layers of the model.
        prompt: the contract's field: prompts run all layers, or those before the exit.
    """
    runs = np.zeros((layers, length), np.bool_)
    runs[:exit_after] = True
    if prompt == "full":
        for start, stop in prompted:
            runs[:, start:stop] = True
    return runs


__all__ = ["early_exit_runs"]
