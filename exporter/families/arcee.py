"""AFM (Arcee): llama with an MLP of squared ReLU, without a gate."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    return llama_like(
        fields, gated_mlp=False, qkv_bias=bias, attention_output_bias=bias, mlp_bias=fields.flag("mlp_bias")
    )


FAMILY = Family("arcee", "AFM (Arcee)", "squared ReLU without a gate", _read)
