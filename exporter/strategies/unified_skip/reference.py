"""Unified Skip, told once more in plain words for the golden: which tokens run in which layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from dynexport.runtime.bundle.errors import DynexportError


def unified_skip_runs(
    prompt_length: int,
    total_length: int,
    keep: Collection[int],
    layers: int,
    *,
    segments: Sequence[tuple[int, int]] = (),
) -> NDArray[np.bool_]:
    """Prompt tokens run in every layer, all others in the kept layers only (the routing contract).

    Args:
        prompt_length: tokens 0 .. prompt_length - 1 were given as prompt.
        total_length: all tokens, generated ones that are fed back included.
        keep: indices of the layers in which generated tokens run.
        layers: layers of the model.
        segments: (start, stop) of further tokens given as prompt, such as a conversation's later turns.

    Returns:
        bool [layers, total_length]: whether a token runs in a layer.

    Raises:
        DynexportError: when a kept layer or a prompt segment lies outside the model or the sequence.
    """
    outside = sorted(layer for layer in keep if not 0 <= layer < layers)
    if outside:
        raise DynexportError(f"unified-skip: expected kept layers in 0..{layers - 1}, found {outside}")
    runs = np.zeros((layers, total_length), dtype=np.bool_)
    runs[sorted(keep)] = True
    for start, stop in [(0, prompt_length), *segments]:
        if not 0 <= start <= stop <= total_length:
            raise DynexportError(
                f"unified-skip: expected prompt segments within 0..{total_length}, found ({start}, {stop})"
            )
        runs[:, start:stop] = True
    return runs
