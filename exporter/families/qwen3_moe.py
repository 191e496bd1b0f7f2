"""Qwen3 with a mixture of experts: qwen3 whose MLPs are experts, chosen by a router."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.experts import one_by_one, read_experts, sparse_layers, with_experts
from dynexport.exporter.families.family import Family, llama_like, used_window
from dynexport.exporter.families.fields import Fields

QWEN_EXPERTS = one_by_one("model.layers.{i}.mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj")


def _read(fields: Fields) -> Architecture:
    layers, bias = sparse_layers(fields), fields.flag("attention_bias")
    architecture = llama_like(
        fields,
        qk_norm="head",
        qkv_bias=bias,
        attention_output_bias=bias,
        activation="silu",
        windows=(used_window(fields),) * len(layers),
    )
    experts = read_experts(
        fields,
        size="moe_intermediate_size",
        count="num_local_experts",
        layers=layers,
        normalised=fields.flag("norm_topk_prob"),
    )
    return with_experts(architecture, experts, QWEN_EXPERTS)


FAMILY = Family(
    "qwen3_moe",
    "Qwen3 MoE",
    "mixture of experts, norms on q and k",
    _read,
    twins={"num_experts": "num_local_experts"},
)
