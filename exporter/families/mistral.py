"""Mistral: llama with a sliding window."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, same_window
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    return llama_like(fields, windows=same_window(fields))


FAMILY = Family("mistral", "Mistral", "sliding-window attention", _read, own_layers=True)
