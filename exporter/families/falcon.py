"""Falcon: attention and MLP in parallel, one key head or groups of heads in a fused qkv, LayerNorm."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import read_rotary
from dynexport.exporter.families.sources import combined, grouped_qkv, renamed

_OUTER = {"model.embed_tokens": "transformer.word_embeddings", "model.norm": "transformer.ln_f"}
_INNER = {
    "input_layernorm": "input_layernorm",
    "self_attn.qkv_proj": "self_attention.query_key_value",
    "self_attn.o_proj": "self_attention.dense",
    "post_attention_layernorm": "post_attention_layernorm",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}
_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}


def _kv_heads(fields: Fields, heads: int, *, new: bool) -> int:
    """Return the number of key heads: of groups in the new architecture, else one or as many as query heads."""
    multi_query = fields.flag("multi_query")
    if new:
        return fields.integer("num_kv_heads", default=heads)
    if multi_query:
        fields.get("num_kv_heads")
        return 1
    fields.only("num_kv_heads", heads, "`num_attention_heads`")
    return heads


def _layout(fields: Fields, *, new: bool) -> dict[str, Any]:
    """Return how a layer is put together: two norms, one norm for both of its parts, or one after the other."""
    if new:
        fields.only("parallel_attn", True)
        two = fields.integer("num_ln_in_parallel_attn", default=2, at_most=2) == 2
        return {"residual": "parallel", "shared_norm": not two}
    fields.only("num_ln_in_parallel_attn", 1)
    parallel = fields.flag("parallel_attn")
    return {"residual": "parallel" if parallel else "sequential", "shared_norm": parallel}


def _read(fields: Fields) -> Architecture:
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if hidden % heads:
        raise fields.error("hidden_size", hidden, f"a multiple of {heads} heads")
    # transformers rounds its biases to bfloat16
    fields.only("alibi", False)
    fields.only("head_dim", hidden // heads, "`hidden_size` over heads")
    layers, new = fields.layers("num_hidden_layers"), fields.flag("new_decoder_architecture")
    kv_heads, layout = _kv_heads(fields, heads, new=new), _layout(fields, new=new)
    bias, max_length = fields.flag("bias"), fields.integer("max_position_embeddings")
    rotary = read_rotary(fields, hidden // heads, max_length)
    two_norms = new and not layout["shared_norm"]
    sources = renamed(layers, _OUTER, _INNER | (_TWO_NORMS if two_norms else {}), "transformer.h.{i}.")
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=fields.integer("ffn_hidden_size", default=4 * hidden),
        vocab_size=fields.integer("vocab_size"),
        max_length=rotary.context(max_length),
        positions=rotary,
        norm="layer",
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation"),
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        sources=combined(sources, "qkv_proj", grouped_qkv(kv_heads, heads // kv_heads, hidden // heads)),
        **layout,
    )


FAMILY = Family(
    "falcon",
    "Falcon",
    "parallel residual, one key head or groups, LayerNorm",
    _read,
    base_prefix="transformer.",
    twins={"n_embed": "hidden_size"},
)
