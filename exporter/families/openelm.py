"""OpenELM (arXiv 2404.14619): heads and MLP channels grow from layer to layer, by factors that the config gives."""

from __future__ import annotations

from typing import Any

import numpy as np

from dynexport.exporter.families.architecture import Architecture, LayerSizes, Rotary
from dynexport.exporter.families.class_fields import ROTARY
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import Sources, renamed, split_gate_up

_OUTER = {"model.embed_tokens": "transformer.token_embeddings", "model.norm": "transformer.norm", "lm_head": "lm_head"}
_INNER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn.qkv_proj",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "self_attn.o_proj": "attn.out_proj",
    "mlp.down_proj": "ffn.proj_2",
}
_LAYER = "transformer.layers.{i}."
# The epsilon stands in the model's code, not in its config.
_EPSILON = 1e-6
_LARGEST_FACTOR = 1024


def _read(fields: Fields) -> Architecture:
    fields.only("normalization_layer_name", "rms_norm")
    fields.only("ffn_with_glu", True)
    for name in (*ROTARY, "num_key_value_heads", "intermediate_size"):
        fields.only(name, None)
    hidden, head_dim = fields.integer("model_dim"), fields.integer("head_dim", at_most=1 << 16)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "an even number")
    tied = fields.flag("share_input_output_layers")
    fields.only("tie_word_embeddings", tied, "`share_input_output_layers`")
    layers, base = fields.layers("num_transformer_layers"), fields.number("rope_freq_constant")
    sizes = _sizes(fields, hidden, head_dim, layers)
    return Architecture(
        family=fields.family,
        hidden_size=hidden,
        layers=layers,
        heads=sizes[0].heads,
        kv_heads=sizes[0].kv_heads,
        head_dim=head_dim,
        intermediate_size=sizes[0].intermediate_size,
        vocab_size=fields.integer("vocab_size"),
        max_length=fields.integer("max_context_length"),
        positions=Rotary(head_dim, tuple(base ** (-i / head_dim) for i in range(0, head_dim, 2))),
        norm_epsilon=_EPSILON,
        activation=fields.activation("activation_fn_name"),
        qk_norm="head" if fields.flag("normalize_qk_projections") else None,
        tied_embeddings=tied,
        sources=_sources(layers),
    ).with_sizes(sizes)


def _sizes(fields: Fields, hidden: int, head_dim: int, layers: int) -> list[LayerSizes]:
    """Return the sizes of all layers; the lists of heads that published configs also have must agree with them."""
    groups, divisor = fields.integer("num_gqa_groups"), fields.integer("ffn_dim_divisor")
    heads = [
        _divisible(factor * hidden, head_dim * groups) // head_dim
        for factor in _factors(fields, "qkv_multipliers", layers, listed=False)
    ]
    widths = [
        _divisible(factor * hidden, divisor) for factor in _factors(fields, "ffn_multipliers", layers, listed=True)
    ]
    for name, found in (("num_query_heads", heads), ("num_kv_heads", [count // groups for count in heads])):
        fields.only(name, found, "`qkv_multipliers` and `num_gqa_groups` say")
    return [LayerSizes(count, count // groups, width) for count, width in zip(heads, widths, strict=True)]


def _factors(fields: Fields, name: str, layers: int, *, listed: bool) -> list[float]:
    """Return a factor for each layer: one number for all, two for a line from first to last, or ``listed`` all."""
    given: Any = fields.get(name)
    values = list(given) if isinstance(given, list | tuple) else [given]
    if not all(_is_factor(value) for value in values) or len(values) not in (1, 2, *([layers] if listed else [])):
        kinds = (
            f"one, the first and the last, or {layers}, num_transformer_layers"
            if listed
            else "one, or the first and the last"
        )
        raise fields.error(name, given, f"factors above 0 and up to {_LARGEST_FACTOR}: {kinds}")
    if len(values) == 2:
        return [round(float(value), 2) for value in np.linspace(values[0], values[1], layers)]
    return values * layers if len(values) == 1 else values


def _is_factor(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= _LARGEST_FACTOR


def _divisible(value: float, divisor: int) -> int:
    """Return the multiple of ``divisor`` nearest to a value; the next one where that is over a tenth below it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _sources(layers: int) -> Sources:
    return renamed(layers, _OUTER, _INNER, _LAYER) | split_gate_up(layers, f"{_LAYER}ffn.proj_1.weight")


FAMILY = Family(
    "openelm",
    "OpenELM",
    "numbers of heads and MLP channels that grow from layer to layer, norms on q and k",
    _read,
    base_prefix="",
    twins={"hidden_size": "model_dim", "num_hidden_layers": "num_transformer_layers"},
)
