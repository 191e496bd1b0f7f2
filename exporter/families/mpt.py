"""MPT: ALiBi, LayerNorm without biases, queries, keys and values that may be clipped."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Alibi, Architecture
from dynexport.exporter.families.class_fields import NEUTRAL
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import renamed, without_bias

_OUTER = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.norm_f"}
_INNER = {
    "input_layernorm": "norm_1",
    "self_attn.qkv_proj": "attn.Wqkv",
    "self_attn.o_proj": "attn.out_proj",
    "post_attention_layernorm": "norm_2",
    "mlp.up_proj": "ffn.up_proj",
    "mlp.down_proj": "ffn.down_proj",
}
# The only values that transformers' class computes with; it does not read some of these fields.
_ONLY = {"expansion_ratio": 4, "no_bias": True, "norm_type": "low_precision_layernorm", "logit_scale": None}
_ONLY_ATTENTION = {
    "attn_type": "multihead_attention",
    "prefix_lm": False,
    "qk_ln": False,
    "attn_uses_sequence_id": False,
    "alibi": True,
    "alibi_bias_max": 8,
}


def _attention(fields: Fields) -> dict[str, float | None]:
    """Return what ``attn_config`` says, after a check that all of its fields are known."""
    values = fields.get("attn_config", {})
    if not isinstance(values, dict):
        raise fields.error("attn_config", values, "an object")
    attention = fields.within("attn_config: ", values)
    for name, value in {**NEUTRAL, **_ONLY_ATTENTION}.items():
        attention.only(name, value)
    found = {
        "qkv_clip": attention.optional_number("clip_qkv"),
        "attention_scale": attention.optional_number("softmax_scale"),
    }
    attention.check_known()
    return found


def _read(fields: Fields) -> Architecture:
    hidden, heads, layers = fields.integer("d_model"), fields.integer("n_heads"), fields.layers("n_layers")
    for name, value in _ONLY.items():
        fields.only(name, value)
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        **_attention(fields),
        intermediate_size=4 * hidden,
        max_length=fields.integer("max_seq_len"),
        positions=Alibi(heads),
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation="gelu",
        sources=without_bias(renamed(layers, _OUTER, _INNER, "transformer.blocks.{i}."), "norm"),
    )


FAMILY = Family(
    "mpt",
    "MPT",
    "ALiBi, LayerNorm without biases",
    _read,
    base_prefix="transformer.",
    twins={
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    },
)
