"""Phi-3 and Phi-4: fused qkv and gate-up weights, partial rotary positions, longrope for long contexts."""

from __future__ import annotations

from collections.abc import Callable

from dynexport.exporter.families.architecture import Architecture, Array, Source
from dynexport.exporter.families.family import Family, llama_like, same_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults

# Early checkpoints write "su" or "yarn" for longrope.
_TYPES = {"default": "default", **dict.fromkeys(("longrope", "su", "yarn"), "longrope")}
_ROPE = RopeDefaults(share=1.0, types=_TYPES)
# Fields of Phi-3-small's and Phi-4-mini's configs that transformers' class does not have.
_VARIANTS = {"lm_head_bias": False, "full_attn_mod": 1, "interpolate_factor": 1}


def _half(which: int) -> Callable[[list[Array]], Array]:
    def combine(parts: list[Array]) -> Array:
        rows = parts[0].shape[0] // 2
        return parts[0][which * rows : (which + 1) * rows]

    return combine


def _read(fields: Fields) -> Architecture:
    layers = fields.layers("num_hidden_layers")
    for name, value in _VARIANTS.items():
        fields.only(name, value)
    gate_up = {
        f"model.layers.{i}.mlp.{part}_proj.weight": Source(
            (f"model.layers.{i}.mlp.gate_up_proj.weight",), _half(which), moves_rows=True
        )
        for i in range(layers)
        for which, part in enumerate(("gate", "up"))
    }
    return llama_like(
        fields,
        rope=_ROPE,
        windows=same_window(fields),
        sources=gate_up,
    )


FAMILY = Family("phi3", "Phi-3, Phi-4", "fused qkv and gate-up, partial rotary, longrope, sliding window", _read)
