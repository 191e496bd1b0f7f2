"""Granite 3 and 4 (dense): llama with multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields


def granite_multipliers(fields: Fields) -> dict[str, Any]:
    """Return the architecture's scales; a multiplier of 1 is left out."""
    scales = {
        "embedding_scale": fields.number("embedding_multiplier"),
        "residual_scale": fields.number("residual_multiplier"),
        "logits_scale": 1 / fields.number("logits_scaling"),
    }
    used = {name: None if scale == 1 else scale for name, scale in scales.items()}
    return {**used, "attention_scale": fields.number("attention_multiplier")}


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    return llama_like(
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        **granite_multipliers(fields),
    )


FAMILY = Family("granite", "Granite 3", "multipliers of embeddings, scores, residuals and logits", _read)
