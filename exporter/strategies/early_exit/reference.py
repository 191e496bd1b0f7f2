"""Early exit in PyTorch: which tokens run in which layer, as the routing contract says."""

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
    """Return which tokens run in which layer: bool [layers, length].

    Args:
        prompted: (start, stop) of the tokens that were given as prompt, of every turn; others were generated.
        length: tokens of the sequence.
        exit_after: layers that a generated token runs in.
        layers: of the model.
        prompt: as in the contract.
    """
    runs = np.zeros((layers, length), np.bool_)
    runs[:exit_after] = True
    if prompt == "full":
        for start, stop in prompted:
            runs[:, start:stop] = True
    return runs


__all__ = ["early_exit_runs"]
