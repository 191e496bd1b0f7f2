"""Qwen3 (dense): per-head norms on q and k before rotary positions."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.qwen2 import qwen_windows


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    return llama_like(
        fields,
        qk_norm="head",
        qkv_bias=bias,
        attention_output_bias=bias,
        windows=qwen_windows(fields),
    )


FAMILY = Family("qwen3", "Qwen3", "norms on q and k", _read, own_layers=True)
