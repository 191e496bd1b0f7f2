"""Qwen2 and Qwen2.5: llama with biases on q, k and v."""

from __future__ import annotations

from dynexport.exporter.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields


def qwen_windows(fields: Fields) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on slide, when ``use_sliding_window`` is set."""
    window = fields.optional_integer("sliding_window", 4096) if fields.flag("use_sliding_window", False) else None
    first = fields.integer("max_window_layers", default=28, at_least=0)
    return layer_windows(fields, window, [i >= first for i in range(fields.layers("num_hidden_layers"))])


def _read(fields: Fields) -> Architecture:
    return llama_like(fields, qkv_bias=True, windows=qwen_windows(fields))


FAMILY = Family("qwen2", "Qwen2, Qwen2.5", "biases on q, k and v", _read)
