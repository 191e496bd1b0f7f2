"""An independent definition of unified-skip for the reference: which tokens run in which layer."""

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
    """Return which tokens run in which layer: prompt tokens in all, generated tokens in the kept ones.

    Args:
        prompt_length: number of tokens of the first prompt, which starts at 0.
        total_length: number of all tokens, including generated ones that are fed back.
        keep: numbers of the layers in which generated tokens run.
        layers: number of layers of the model.
        segments: (start, stop) of further prompts, such as a conversation's later turns.

    Returns:
        bool [layers, total_length], true where the token runs in the layer.

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
