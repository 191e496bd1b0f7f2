"""Granite 3 with a mixture of experts: granite whose MLPs are experts, stored together in two tensors."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture, Source
from dynexport.exporter.families.experts import every_layer, halves, read_experts, with_experts
from dynexport.exporter.families.family import Family, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.granite import granite_multipliers


def _of_expert(layer: int, expert: int) -> dict[str, Source]:
    prefix = f"model.layers.{layer}.block_sparse_moe."
    return {
        "gate_up_proj.weight": Source((f"{prefix}input_linear.weight",), halves, item=expert),
        "down_proj.weight": Source((f"{prefix}output_linear.weight",), item=expert),
    }


def _read(fields: Fields) -> Architecture:
    bias = fields.flag("attention_bias")
    architecture = llama_like(
        fields,
        qkv_bias=bias,
        attention_output_bias=bias,
        activation="silu",
        **granite_multipliers(fields),
    )
    experts = read_experts(
        fields, size="intermediate_size", count="num_local_experts", layers=every_layer(fields), normalised=True
    )
    return with_experts(architecture, experts, _of_expert, "block_sparse_moe.router.layer")


FAMILY = Family("granitemoe", "Granite 3 MoE", "granite with a mixture of experts", _read)
