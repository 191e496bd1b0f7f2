"""Llama 1 to 3, and the models that share its config: SmolLM, SmolLM2, TinyLlama, Vicuna."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    return llama_like(fields, qkv_bias=bias, attention_output_bias=bias, mlp_bias=fields.flag("mlp_bias"))


FAMILY = Family(
    "llama",
    "Llama, SmolLM2",
    "RMSNorm, rotary (llama3 scaling), grouped-query attention, SwiGLU",
    _read,
    own_layers=True,
)
