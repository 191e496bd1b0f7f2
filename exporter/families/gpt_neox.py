"""GPT-NeoX and Pythia: attention and MLP in parallel, partial rotary positions, interleaved fused qkv."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults, read_rotary
from dynexport.exporter.families.sources import combined, grouped_qkv, renamed

_OUTER = {
    "model.embed_tokens": "gpt_neox.embed_in",
    "model.norm": "gpt_neox.final_layer_norm",
    "lm_head": "embed_out",
}
_INNER = {
    "input_layernorm": "input_layernorm",
    "self_attn.qkv_proj": "attention.query_key_value",
    "self_attn.o_proj": "attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_ROPE = RopeDefaults(theta_name="rotary_emb_base", share=0.25, share_name="rotary_pct")


def _read(fields: Fields) -> Architecture:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.layers("num_hidden_layers")
    head_dim = hidden // heads
    bias = fields.flag("attention_bias")
    max_length = fields.integer("max_position_embeddings")
    rotary = read_rotary(fields, head_dim, max_length, _ROPE)
    sources = renamed(layers, _OUTER, _INNER, "gpt_neox.layers.{i}.")
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        intermediate_size=fields.integer("intermediate_size"),
        max_length=rotary.context(max_length),
        positions=rotary,
        norm_epsilon=fields.number("layer_norm_eps"),
        activation=fields.activation("hidden_act"),
        residual="parallel" if fields.flag("use_parallel_residual") else "sequential",
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=True,
        sources=combined(sources, "qkv_proj", grouped_qkv(heads, 1, head_dim)),
    )


FAMILY = Family(
    "gpt_neox",
    "GPT-NeoX, Pythia",
    "parallel residual, partial rotary",
    _read,
    base_prefix="gpt_neox.",
    renamed={"embed_out.weight": "lm_head.weight"},
    masks=r"(gpt_neox\.)?layers\.\d+\.attention\.(masked_)?bias",
)
