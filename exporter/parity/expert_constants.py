"""Comparison of the constants of mixtures of experts in a bundle's graphs with its config."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dynexport.exporter.families.architecture import Architecture, Experts
from dynexport.exporter.graph.reading import GraphFile, number, text, unequal

_KERNELS = ("MoE", "QMoE")


def expert_differences(graph: GraphFile, architecture: Architecture) -> Iterator[str]:
    """Yield every constant of ONNX Runtime's operators of experts that differs, and layers without one."""
    seen: set[int | None] = set()
    for node in graph.of_type(*_KERNELS):
        layer = graph.layer_of(node)
        seen.add(layer)
        experts = None if layer is None else architecture.experts_of(layer)
        if experts is None:
            yield f"{graph.where(node)}: expected no experts, found some"
            continue
        for name, expected in _attributes(experts).items():
            yield from unequal(f"{graph.where(node)}: {name}", expected, number(node, name, -1))
        yield from unequal(f"{graph.where(node)}: activation", "swiglu", text(node, "activation_type", "relu"))
    if graph.is_step and seen:
        expected_layers = {layer for layer in graph.entry.layers if architecture.experts_of(layer) is not None}
        yield from unequal(f"{graph.entry.name}: layers with experts", expected_layers, seen)


def _attributes(experts: Experts) -> dict[str, float]:
    values = {
        "k": experts.chosen,
        "normalize_routing_weights": experts.normalised,
        "swiglu_fusion": 1,
        "activation_alpha": experts.alpha,
        "activation_beta": experts.beta,
        "swiglu_limit": -1 if experts.limit is None else experts.limit,
    }
    return {name: float(np.float32(value)) for name, value in values.items()}


__all__ = ["expert_differences"]
