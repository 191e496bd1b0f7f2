"""OLMo 2: norms only after attention and MLP, and on all queries and keys of a token together."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    return llama_like(
        fields, qk_norm="all", pre_norms=False, post_norms=True, qkv_bias=bias, attention_output_bias=bias
    )


FAMILY = Family("olmo2", "OLMo 2", "post-norms only, norms on whole q and k", _read)
