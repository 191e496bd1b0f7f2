"""The sizes of a call's dimensions, by their symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.runtime.bundle.manifest import TensorSpec

Array = np.ndarray


def sizes_of(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return symbol -> size, of the arrays that are there."""
    return {
        dim: size
        for spec in specs
        if spec.name in arrays
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


__all__ = ["sizes_of"]
