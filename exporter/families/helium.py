"""Helium: llama that rotates neighbouring channels."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, neighbours_rotated
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults


def _read(fields: Fields) -> Architecture:
    bias, rope = fields.flag("attention_bias"), RopeDefaults(theta=100000.0)
    return neighbours_rotated(llama_like(fields, rope=rope, qkv_bias=bias, mlp_bias=fields.flag("mlp_bias")))


FAMILY = Family("helium", "Helium", "rotary of neighbouring channels", _read)
