"""Gemma and CodeGemma: scaled embeddings, norms that multiply by 1 + w, wide heads."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import norms, one_plus


def _read(fields: Fields) -> Architecture:
    hidden, layers = fields.integer("hidden_size"), fields.layers("num_hidden_layers")
    fields.only("use_bidirectional_attention", False)
    bias = fields.flag("attention_bias")
    # The first checkpoints say "gelu" and were trained with the tanh approximation, which transformers takes.
    activation = fields.activation("hidden_act")
    if fields.get("hidden_act") == "gelu":
        activation = "gelu_tanh"
    fields.only("hidden_activation", "gelu_pytorch_tanh" if activation == "gelu_tanh" else fields.get("hidden_act"))
    return llama_like(
        fields,
        activation=activation,
        embedding_scale=hidden**0.5,
        qkv_bias=bias,
        attention_output_bias=bias,
        sources=one_plus(norms(layers, "input_layernorm", "post_attention_layernorm")),
    )


FAMILY = Family("gemma", "Gemma, CodeGemma", "scaled embeddings, norms of 1 + w", _read)
