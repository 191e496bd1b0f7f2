"""Gemma 3, text: gemma2 with norms on q and k, windows in five of six layers, with their own rotary positions."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_windows
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.gemma2 import gemma2_like
from dynexport.exporter.families.rope import RopeDefaults

_WINDOWS_IN = 6


def _read(fields: Fields) -> Architecture:
    layers, window = fields.layers("num_hidden_layers"), fields.integer("sliding_window")
    every = fields.integer("sliding_window_pattern", default=_WINDOWS_IN)
    # transformers does not cap the scores of this family
    fields.only("attn_logit_softcapping", None)
    bias = fields.flag("attention_bias")
    return gemma2_like(
        fields,
        "self_attn.q_norm",
        "self_attn.k_norm",
        rope=RopeDefaults(theta=1000000.0),
        sliding_rope=RopeDefaults(theta_name="rope_local_base_freq"),
        qk_norm="head",
        qkv_bias=bias,
        attention_output_bias=bias,
        windows=layer_windows(fields, window, [(i + 1) % every != 0 for i in range(layers)]),
    )


FAMILY = Family(
    "gemma3_text",
    "Gemma 3 (text)",
    "gemma2 without soft-capped scores, norms on q and k, two rotary bases",
    _read,
)
