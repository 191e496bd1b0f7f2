"""Phi-3 and Phi-4: fused qkv and gate-up weights, partial rotary positions, longrope for long contexts."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like, same_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults
from dynexport.exporter.families.sources import split_gate_up

# Early checkpoints write "su" or "yarn" for longrope.
_TYPES = {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
_ROPE = RopeDefaults(share=1.0, types=_TYPES)
# Fields of Phi-3-small's and Phi-4-mini's configs that transformers' class does not have.
_VARIANTS = {"lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}


def _read(fields: Fields) -> Architecture:
    layers = fields.layers("num_hidden_layers")
    for name, value in _VARIANTS.items():
        fields.only(name, value)
    return llama_like(
        fields,
        stack_qkv=False,
        rope=_ROPE,
        windows=same_window(fields),
        sources=split_gate_up(layers),
    )


FAMILY = Family("phi3", "Phi-3, Phi-4", "fused qkv and gate-up, partial rotary, longrope, sliding window", _read)
