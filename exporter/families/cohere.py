"""Command R: attention and MLP in parallel behind one LayerNorm without a bias, scaled logits."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, neighbours_rotated
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults
from dynexport.exporter.families.sources import norms, same_names, without_bias


def _read(fields: Fields) -> Architecture:
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    fields.only("use_qk_norm", False)
    return neighbours_rotated(
        llama_like(
            fields,
            rope=RopeDefaults(theta=500000.0),
            norm="layer",
            norm_epsilon=fields.number("layer_norm_eps"),
            residual="parallel",
            shared_norm=True,
            logits_scale=fields.number("logit_scale"),
            qkv_bias=bias,
            attention_output_bias=bias,
            sources=without_bias(same_names(norms(layers, "input_layernorm")), "norm"),
        )
    )


FAMILY = Family("cohere", "Command R", "parallel residual behind one LayerNorm, scaled logits", _read)
