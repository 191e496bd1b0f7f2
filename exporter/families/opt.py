"""OPT: learned positions with an offset of two, LayerNorm, ReLU."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture, LearnedPositions
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import renamed, stacked_qkv

_OUTER = {
    "model.embed_tokens": "model.decoder.embed_tokens",
    "model.embed_positions": "model.decoder.embed_positions",
    "model.norm": "model.decoder.final_layer_norm",
}
_INNER = {
    "input_layernorm": "self_attn_layer_norm",
    "self_attn.o_proj": "self_attn.out_proj",
    "post_attention_layernorm": "final_layer_norm",
    "mlp.up_proj": "fc1",
    "mlp.down_proj": "fc2",
}
_POSITION_OFFSET = 2


def _read(fields: Fields) -> Architecture:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    layers = fields.layers("num_hidden_layers")
    fields.only("do_layer_norm_before", True)
    fields.only("word_embed_proj_dim", hidden, "`hidden_size`")
    fields.only("_remove_final_layer_norm", False)
    fields.only("layer_norm_elementwise_affine", True)
    max_length = fields.integer("max_position_embeddings")
    bias = fields.flag("enable_bias")
    sources = renamed(layers, _OUTER, _INNER, "model.decoder.layers.{i}.")
    sources |= stacked_qkv(layers, bias=bias, prefix="model.decoder.layers.{i}.self_attn.")
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        intermediate_size=fields.integer("ffn_dim"),
        max_length=max_length,
        positions=LearnedPositions(max_length + _POSITION_OFFSET, _POSITION_OFFSET),
        activation=fields.activation("activation_function"),
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        sources=sources,
    )


FAMILY = Family("opt", "OPT", "learned positions, LayerNorm, ReLU", _read)
