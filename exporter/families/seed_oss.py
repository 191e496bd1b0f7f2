"""Seed-OSS: llama with biases on q, k and v."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    return llama_like(
        fields,
        qkv_bias=fields.flag("attention_bias"),
        attention_output_bias=fields.flag("attention_out_bias"),
        mlp_bias=fields.flag("mlp_bias"),
    )


FAMILY = Family("seed_oss", "Seed-OSS", "biases on q, k and v", _read)
