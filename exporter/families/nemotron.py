"""Nemotron and Minitron: LayerNorm of 1 + w, partial rotary positions, squared ReLU without a gate."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults
from dynexport.exporter.families.sources import norms, one_plus


def _read(fields: Fields) -> Architecture:
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    return llama_like(
        fields,
        rope=RopeDefaults(share=0.5),
        norm="layer",
        norm_epsilon=fields.number("norm_eps"),
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        sources=one_plus(norms(layers, "input_layernorm", "post_attention_layernorm")),
    )


FAMILY = Family("nemotron", "Nemotron, Minitron", "LayerNorm of 1 + w, partial rotary, squared ReLU", _read)
