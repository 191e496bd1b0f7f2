"""GPT-2: learned positions, LayerNorm, biases everywhere; its Conv1D weights are stored transposed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dynexport.exporter.families.architecture import Architecture, Array, LearnedPositions
from dynexport.exporter.families.family import Family, layer_norm_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import Combine, renamed

_OUTER = {
    "model.embed_tokens": "transformer.wte",
    "model.embed_positions": "transformer.wpe",
    "model.norm": "transformer.ln_f",
}
_INNER = {
    "input_layernorm": "ln_1",
    "self_attn.qkv_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def _transposed(parts: list[Array]) -> Array:
    return np.ascontiguousarray(parts[0].T)


def gpt2_like(fields: Fields, combine: Combine | None) -> Architecture:
    """Return the architecture that gpt2 and gpt_bigcode share; ``combine`` is applied to matrices of layers."""
    hidden, heads = fields.integer("n_embd"), fields.integer("n_head")
    layers = fields.layers("n_layer")
    fields.only("scale_attn_weights", True)
    max_length = fields.integer("n_positions")
    sources = renamed(layers, _OUTER, _INNER, "transformer.h.{i}.")
    for name in list(sources):
        if name.endswith("_proj.weight"):
            sources[name] = replace(sources[name], combine=combine)
    return layer_norm_like(
        fields,
        hidden_size=hidden,
        heads=heads,
        layers=layers,
        intermediate_size=fields.integer("n_inner", default=4 * hidden),
        max_length=max_length,
        positions=LearnedPositions(max_length),
        norm_epsilon=fields.number("layer_norm_epsilon"),
        activation=fields.activation("activation_function"),
        qkv_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        sources=sources,
    )


def _read(fields: Fields) -> Architecture:
    fields.only("scale_attn_by_inverse_layer_idx", False)
    return gpt2_like(fields, _transposed)


FAMILY = Family(
    "gpt2",
    "GPT-2",
    "learned positions, LayerNorm, biases",
    _read,
    base_prefix="transformer.",
    twins={
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    masks=r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",
)
