"""The parts that our own PyTorch models share: rotary positions, and a pass through their layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def rotary(base: float, head_dim: int) -> Any:
    """Return a module that gives cos and sin of positions.

    It takes the hidden states, which it does not read, and positions int64 [rows, tokens], and returns float32
    [rows, tokens, head_dim] each, with the angles twice.
    """
    import torch

    class Rotary(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, config: Any = None) -> None:  # as transformers' modules, which are built again from a config
            super().__init__()

        @property
        def inv_freq(self) -> Any:
            return base ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)

        def forward(self, _: Any, positions: Any) -> tuple[Any, Any]:
            angles = positions[..., None].float() * self.inv_freq.repeat(2)
            return angles.cos(), angles.sin()

    return Rotary()


def run_layers(layers: Iterable[Any], hidden_states: Any, rotation: Any, padding: Any, *, use_cache: bool) -> Any:
    """Return the hidden states after all layers, each called with hidden states, causal mask, rotation and cache.

    Args:
        layers: the layers, in order.
        hidden_states: float32 [rows, tokens, hidden].
        rotation: the module of ``rotary``.
        padding: int64 [rows, tokens], 0 for padding; None: no token is.
        use_cache: whether layers write keys and values into a new cache.
    """
    import torch
    from transformers import DynamicCache

    rows, length, _ = hidden_states.shape
    real = torch.ones(rows, length, dtype=torch.bool) if padding is None else padding.bool()
    seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    angles = rotation(hidden_states, torch.arange(length)[None])
    cache = DynamicCache() if use_cache else None
    for layer in layers:
        hidden_states = layer(hidden_states, mask, angles, cache)
    return hidden_states


__all__ = ["rotary", "run_layers"]
