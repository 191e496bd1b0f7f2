"""GLM-4 9B: partial rotary positions of neighbouring channels, fused gate-up."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, neighbours_rotated
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults
from dynexport.exporter.families.sources import split_gate_up


def glm_like(fields: Fields, **overrides: Any) -> Architecture:
    """Return the architecture that glm and glm4 share."""
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    fused = split_gate_up(layers)
    sources = fused | overrides.pop("sources", {})
    return neighbours_rotated(
        llama_like(fields, rope=RopeDefaults(share=0.5), qkv_bias=bias, sources=sources, **overrides)
    )


def _read(fields: Fields) -> Architecture:
    return glm_like(fields)


FAMILY = Family("glm", "GLM-4 (2024)", "partial rotary of neighbouring channels, fused gate-up", _read)
