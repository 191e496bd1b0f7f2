"""OLMoE: a mixture of experts, with norms on all queries and keys of a token together."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.experts import every_layer, read_experts, with_experts
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.qwen3_moe import QWEN_EXPERTS


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    architecture = llama_like(
        fields,
        qk_norm="all",
        qkv_clip=fields.optional_number("clip_qkv"),
        qkv_bias=bias,
        attention_output_bias=bias,
        activation="silu",
    )
    experts = read_experts(
        fields,
        size="intermediate_size",
        count="num_experts",
        layers=every_layer(fields),
        normalised=fields.flag("norm_topk_prob"),
    )
    return with_experts(architecture, experts, QWEN_EXPERTS)


FAMILY = Family(
    "olmoe",
    "OLMoE",
    "mixture of experts, norms on whole q and k",
    _read,
    twins={"num_local_experts": "num_experts"},
)
