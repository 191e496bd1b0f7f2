"""GLM-4 0414: glm with norms on both sides of attention and MLP."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.glm import glm_like
from dynexport.exporter.families.sources import renamed

_NORMS = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}


def _read(fields: Fields) -> Architecture:
    return glm_like(fields, post_norms=True, sources=renamed(fields.layers("num_hidden_layers"), {}, _NORMS))


FAMILY = Family("glm4", "GLM-4 0414", "glm with post-norms", _read)
