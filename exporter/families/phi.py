"""Phi-1 and Phi-2: attention and MLP in parallel behind one LayerNorm, partial rotary, a head with a bias."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults
from dynexport.exporter.families.sources import renamed, stacked_qkv

_OUTER = {"model.norm": "model.final_layernorm"}
_INNER = {"self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1", "mlp.down_proj": "mlp.fc2"}


def _read(fields: Fields) -> Architecture:
    layers = fields.layers("num_hidden_layers")
    fields.only("qk_layernorm", False)
    # A tied head would have a bias too, which no checkpoint has.
    fields.only("tie_word_embeddings", False)
    return llama_like(
        fields,
        rope=RopeDefaults(share=0.5),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps"),
        gated_mlp=False,
        residual="parallel",
        shared_norm=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        head_bias=True,
        tied_embeddings=False,
        sources=stacked_qkv(layers, bias=True) | renamed(layers, _OUTER, _INNER),
    )


FAMILY = Family("phi", "Phi-1, Phi-2", "parallel residual behind one LayerNorm, partial rotary", _read)
