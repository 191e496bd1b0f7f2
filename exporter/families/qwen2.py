"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like, used_window
from dynexport.exporter.families.fields import Fields


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Return each layer's window; with ``use_sliding_window``, layers from ``max_window_layers`` on slide."""
    first = fields.integer("max_window_layers", at_least=0)
    layers = fields.layers("num_hidden_layers")
    return layer_windows(fields, used_window(fields), [i >= first for i in range(layers)])


def _read(fields: Fields) -> Architecture:
    return llama_like(fields, qkv_bias=True, windows=qwen_windows(fields))


FAMILY = Family("qwen2", "Qwen2, Qwen2.5", "biases on q, k and v", _read, own_layers=True)
