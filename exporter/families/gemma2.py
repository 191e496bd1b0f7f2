"""Gemma 2: norms on both sides of attention and MLP, soft-capped scores and logits, alternating windows."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import norms, one_plus

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gemma2_like(fields: Fields, *more_norms: str, **overrides: Any) -> Architecture:
    """Return the architecture that gemma2 and gemma3 share; ``more_norms`` are further norms of a layer."""
    layers = fields.layers("num_hidden_layers")
    fields.only("use_bidirectional_attention", False)
    activation = fields.activation("hidden_activation")
    fields.only("hidden_act", fields.get("hidden_activation"), "`hidden_activation`, which transformers reads")
    return llama_like(
        fields,
        activation=activation,
        attention_scale=fields.number("query_pre_attn_scalar") ** -0.5,
        logits_softcap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        post_norms=True,
        sources=one_plus(norms(layers, *_NORMS, *more_norms)),
        **overrides,
    )


def _read(fields: Fields) -> Architecture:
    layers, window = fields.layers("num_hidden_layers"), fields.integer("sliding_window")
    return gemma2_like(
        fields,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        windows=layer_windows(fields, window, [i % 2 == 0 for i in range(layers)]),
    )


FAMILY = Family(
    "gemma2",
    "Gemma 2",
    "post-norms, soft-capped scores and logits, scaled embeddings, alternating windows",
    _read,
)
