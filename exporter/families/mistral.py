"""Mistral: llama with a sliding window."""

from __future__ import annotations

from dynexport.exporter.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    window = fields.integer("sliding_window") if fields.get("sliding_window") is not None else None
    layers = fields.integer("num_hidden_layers")
    return llama_like(fields, windows=layer_windows(fields, layers, window))


FAMILY = Family("mistral", "Mistral", "sliding-window attention", _read)
