"""BLOOM and BLOOMZ (the models of the Unified Layer Skipping paper): ALiBi, and LayerNorm on the embedding."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Alibi, Architecture
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import combined, grouped_qkv, renamed

_OUTER = {
    "model.embed_tokens": "transformer.word_embeddings",
    "model.embed_norm": "transformer.word_embeddings_layernorm",
    "model.norm": "transformer.ln_f",
}
_INNER = {
    "input_layernorm": "input_layernorm",
    "self_attn.qkv_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def _read(fields: Fields) -> Architecture:
    hidden = fields.integer("hidden_size")
    heads = fields.integer("n_head")
    layers = fields.layers("n_layer")
    fields.only("apply_residual_connection_post_layernorm", False)
    fields.only("n_inner", 4 * hidden, "four times `hidden_size`")
    ranks = fields.integer("pretraining_tp")
    if fields.flag("slow_but_exact") and ranks > 1:
        # transformers then omits the biases of the attention and MLP outputs
        raise fields.error("slow_but_exact", True, f"False with a pretraining_tp of {ranks}")
    sources = renamed(layers, _OUTER, _INNER, "transformer.h.{i}.")
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        intermediate_size=4 * hidden,
        max_length=fields.integer("seq_length", default=2048),
        positions=Alibi(heads),
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation="gelu_tanh",
        embedding_norm=True,
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        sources=combined(sources, "qkv_proj", grouped_qkv(heads, 1, hidden // heads)),
    )


FAMILY = Family(
    "bloom",
    "BLOOM, BLOOMZ",
    "ALiBi, LayerNorm on the embedding",
    _read,
    base_prefix="transformer.",
    twins={
        "n_embed": "hidden_size",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "max_position_embeddings": "seq_length",
    },
)
