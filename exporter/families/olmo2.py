"""OLMo 2: norms only after attention and MLP, and on all queries and keys of a token together."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def olmo2_like(fields: Fields, **overrides: Any) -> Architecture:
    """Return the architecture that olmo2 and olmo3 share."""
    bias = fields.flag("attention_bias")
    return llama_like(
        fields,
        qk_norm="all",
        pre_norms=False,
        post_norms=True,
        qkv_bias=bias,
        attention_output_bias=bias,
        **overrides,
    )


def _read(fields: Fields) -> Architecture:
    return olmo2_like(fields)


FAMILY = Family("olmo2", "OLMo 2", "post-norms only, norms on whole q and k", _read)
