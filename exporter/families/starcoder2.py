"""StarCoder2: LayerNorm and biases around grouped-query attention, rotary positions and sliding windows."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, same_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.sources import renamed, stacked_qkv


def _read(fields: Fields) -> Architecture:
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("use_bias")
    sources = stacked_qkv(layers, bias=bias)
    return llama_like(
        fields,
        norm="layer",
        norm_epsilon=fields.number("norm_epsilon"),
        gated_mlp=False,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=bias,
        windows=same_window(fields),
        sources=sources | renamed(layers, {}, {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
    )


FAMILY = Family("starcoder2", "StarCoder2", "LayerNorm, biases, grouped-query attention, sliding window", _read)
