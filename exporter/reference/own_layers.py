"""Layers with fields of their own (``per_layer_config``) in a model whose class builds all layers alike.

transformers reads the field into its configs, but its models do not apply it (5.24). Here every layer that has fields
of its own is built again by transformers' class, from a config with these fields.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

FIELD = "per_layer_config"
_SKIP, _WINDOW = "skip", "sliding_window"
# What a layer may leave out -> its module, and the norm before it.
_PARTS = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}
_SLIDING = "sliding_attention"
# Beyond any context: the masks that the model makes have no window then.
_NO_WINDOW, _MASKED = 1 << 30, -1e30


def own_fields(config: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Return the fields that single layers have in place of the model's, by layer; empty for layers alike."""
    return {int(layer): fields for layer, fields in (config.get(FIELD) or {}).items()}


def replace_layers(model: Any, own: Mapping[int, Mapping[str, Any]]) -> None:
    """Replace the layers of a causal language model that have fields of their own.

    Args:
        model: transformers' model, built without these fields; its weights are not loaded yet.
        own: the result of ``own_fields``.
    """
    layers = model.model.layers if own else []
    for index, fields in own.items():
        config = copy.copy(model.config)
        for name, value in fields.items():
            if name not in (_SKIP, _WINDOW):
                setattr(config, name, value)
        layers[index] = type(layers[index])(config, index)
        for part in fields.get(_SKIP, ()):
            _leave_out(layers[index], part)
    if any(_WINDOW in fields for fields in own.values()):
        _give_windows(model, own)


def _leave_out(layer: Any, part: str) -> None:
    """Replace attention or MLP of a layer by zeros, and the norm before it by nothing."""
    import torch
    from torch import nn

    class Nothing(nn.Module):  # type: ignore[misc]
        def forward(self, hidden_states: Any, **_: Any) -> Any:
            zeros = torch.zeros_like(hidden_states)
            return (zeros, None) if part == "attention" else zeros

    module, norm = _PARTS[part]
    setattr(layer, module, Nothing())
    setattr(layer, norm, nn.Identity())


def _give_windows(model: Any, own: Mapping[int, Mapping[str, Any]]) -> None:
    """Make every layer apply its own window, on masks that have none."""
    config, layers = model.config, model.model.layers
    kinds = getattr(config, "layer_types", None) or [_SLIDING] * len(layers)
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        window = own.get(index, {}).get(_WINDOW, config.sliding_window)
        if kind == _SLIDING and window is not None:
            layer.__class__ = _windowed(type(layer), window)
    if config.sliding_window is not None:
        config.sliding_window = _NO_WINDOW


def _windowed(kind: Any, window: int) -> Any:
    """Return the class of layers that attend to keys fewer than ``window`` positions back."""

    def forward(self: Any, hidden_states: Any, **others: Any) -> Any:
        mask, places = others["attention_mask"], others["position_ids"]
        distance = (places[:, :, None] - places[:, None, :])[:, None]
        distance = distance.repeat(1, 1, 1, mask.shape[-1] // distance.shape[-1])  # keys shown twice: rounded, and not
        others["attention_mask"] = mask.masked_fill(distance >= window, _MASKED)
        return kind.forward(self, hidden_states, **others)

    return type(kind.__name__, (kind,), {"forward": forward})


__all__ = ["FIELD", "own_fields", "replace_layers"]
