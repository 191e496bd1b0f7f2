"""Ministral: mistral whose layers may differ in their windows."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    window = fields.optional_integer("sliding_window")
    sliding = [window is not None] * fields.layers("num_hidden_layers")
    return llama_like(fields, windows=layer_windows(fields, window, sliding))


FAMILY = Family("ministral", "Ministral", "sliding windows, layer by layer", _read)
