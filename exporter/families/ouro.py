"""Ouro: a llama with norms on both sides of attention and MLP, whose whole stack of layers runs several times."""

from __future__ import annotations

from dataclasses import replace

from dynexport.exporter.families.architecture import Architecture, Source
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.qwen2 import qwen_windows

# Norm of the graph -> the checkpoint's name of it.
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "input_layernorm_2",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_attention_layernorm_2",
}


def _read(fields: Fields) -> Architecture:
    architecture = llama_like(fields, post_norms=True, windows=qwen_windows(fields))
    loops, threshold = fields.integer("total_ut_steps"), fields.optional_number("early_exit_threshold")
    if fields.get("early_exit_step") is not None:  # the model's own code takes it before the threshold
        loops, threshold = min(loops, 1 + fields.integer("early_exit_step", at_least=0)), None
    norms = {
        f"model.layers.{i}.{ours}.weight": Source((f"model.layers.{i}.{theirs}.weight",))
        for i in range(architecture.layers)
        for ours, theirs in _NORMS.items()
    }
    return replace(
        architecture,
        loops=loops,
        exit_threshold=None if threshold is None or threshold >= 1 else threshold,
        sources={**architecture.sources, **norms},
    )


FAMILY = Family(
    "ouro",
    "Ouro",
    "the stack of layers runs several times, norms on both sides of attention and MLP",
    _read,
)
