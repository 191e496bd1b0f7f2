"""StableLM 2 and Zephyr: LayerNorm, partial rotary positions, parallel residual as an option."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults


def _read(fields: Fields) -> Architecture:
    fields.only("qk_layernorm", False)
    parallel = fields.flag("use_parallel_residual")
    return llama_like(
        fields,
        rope=RopeDefaults(share=0.25),
        norm="layer",
        norm_epsilon=fields.number("layer_norm_eps"),
        residual="parallel" if parallel else "sequential",
        shared_norm=parallel,
        qkv_bias=fields.flag("use_qkv_bias"),
    )


FAMILY = Family("stablelm", "StableLM", "LayerNorm, partial rotary, gated MLP", _read)
