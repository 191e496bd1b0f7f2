"""ERNIE 4.5 (dense): llama that rotates neighbouring channels."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, neighbours_rotated
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults

_ROPE = RopeDefaults(theta=500000.0)


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("use_bias")
    return neighbours_rotated(llama_like(fields, rope=_ROPE, qkv_bias=bias, attention_output_bias=bias, mlp_bias=bias))


FAMILY = Family("ernie4_5", "ERNIE 4.5", "rotary of neighbouring channels", _read)
