"""GPTBigCode, SantaCoder and StarCoder: GPT-2 with one key head for all query heads."""

from __future__ import annotations

from dataclasses import replace

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.gpt2 import gpt2_like
from dynexport.exporter.families.sources import combined, grouped_qkv


def _read(fields: Fields) -> Architecture:
    multi_query = fields.flag("multi_query")
    a = gpt2_like(fields, combine=None)
    if multi_query:
        return replace(a, kv_heads=1)
    return replace(a, sources=combined(dict(a.sources), "qkv_proj", grouped_qkv(a.heads, 1, a.head_dim)))


FAMILY = Family(
    "gpt_bigcode",
    "GPTBigCode, StarCoder",
    "learned positions, LayerNorm, one key head",
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
