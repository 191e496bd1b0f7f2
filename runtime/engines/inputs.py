"""The sizes of a call's symbolic dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.runtime.bundle.manifest import TensorSpec

Array = np.ndarray


def sizes_of(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Return the size of every symbol of ``specs``, read from the shapes of the arrays given."""
    return {
        dim: size
        for spec in specs
        if spec.name in arrays
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


__all__ = ["sizes_of"]
