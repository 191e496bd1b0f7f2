"""OLMo: llama with LayerNorm without weights; queries, keys and values may be clipped."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import norms, plain_norms


def _read(fields: Fields) -> Architecture:
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    return llama_like(
        fields,
        norm="layer",
        norm_epsilon=1e-5,
        qkv_clip=fields.optional_number("clip_qkv"),
        qkv_bias=bias,
        attention_output_bias=bias,
        sources=plain_norms(
            norms(layers, "input_layernorm", "post_attention_layernorm"), fields.integer("hidden_size")
        ),
    )


FAMILY = Family("olmo", "OLMo", "LayerNorm without weights", _read)
