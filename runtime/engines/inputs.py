"""What a graph takes of a step's inputs, whatever runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dynexport.runtime.bundle.manifest import Graph, TensorSpec

Array = np.ndarray


def wanted_inputs(graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Those that the graph has; of what has a row for each layer of the model, the rows of the graph's layers."""
    names = {spec.name for spec in graph.inputs}
    return {name: _of_layers(graph, name, value) for name, value in inputs.items() if name in names}


def _of_layers(graph: Graph, name: str, value: Array) -> Array:
    by_layer = graph.role == "step" and name in ("cache_lengths", "layer_active")
    return value[list(graph.layers)] if by_layer and len(value) > len(graph.layers) else value


def sizes_of(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, int]:
    """Symbol -> size, of those arrays that are there."""
    return {
        dim: size
        for spec in specs
        if spec.name in arrays
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


__all__ = ["sizes_of", "wanted_inputs"]
