"""The check of strategies that share values between layers, so that these must have one size."""

from __future__ import annotations

from collections.abc import Iterable

from dynexport.exporter.families.architecture import Architecture, LayerSizes
from dynexport.runtime.bundle.errors import DynexportError


def check_alike(strategy: str, architecture: Architecture, layers: Iterable[int]) -> None:
    """Raise DynexportError for layers of different sizes, or without attention or MLP."""
    sizes = {layer: architecture.sizes_of(layer) for layer in layers if layer < architecture.layers}
    for layer, own in sizes.items():
        first = next(iter(sizes))
        if not (own.heads and own.intermediate_size):
            found = f"layer {layer} with {_text(own)}"
        elif own != sizes[first]:
            found = f"layer {first} with {_text(sizes[first])} and layer {layer} with {_text(own)}"
        else:
            continue
        raise DynexportError(
            f"{strategy}: expected layers of one size with attention and MLP, found {found}; unified-skip and "
            "early-exit take layers of any size"
        )


def _text(own: LayerSizes) -> str:
    attention = f"{own.heads} heads, {own.kv_heads} key heads" if own.heads else "no attention"
    return (
        f"{attention}, {own.intermediate_size} channels in its MLP" if own.intermediate_size else f"{attention}, no MLP"
    )


__all__ = ["check_alike"]
