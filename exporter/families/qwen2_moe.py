"""Qwen1.5-MoE and Qwen2 with a mixture of experts: one more expert, with a gate of its own, runs for every token."""

from __future__ import annotations

from dataclasses import replace

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.experts import read_experts, sparse_layers, with_experts
from dynexport.exporter.families.family import Family, layer_windows, llama_like, used_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.qwen3_moe import QWEN_EXPERTS


def _windows(fields: Fields) -> tuple[int | None, ...]:
    """Return each layer's window; with ``use_sliding_window``, every second one before ``max_window_layers`` slides."""
    first = fields.integer("max_window_layers", at_least=0)
    layers = fields.layers("num_hidden_layers")
    window = used_window(fields)
    return layer_windows(fields, window, [i % 2 == 0 and i < first and window is not None for i in range(layers)])


def _read(fields: Fields) -> Architecture:
    architecture = llama_like(fields, qkv_bias=fields.flag("qkv_bias"), activation="silu", windows=_windows(fields))
    experts = read_experts(
        fields,
        size="moe_intermediate_size",
        count="num_experts",
        layers=sparse_layers(fields),
        normalised=fields.flag("norm_topk_prob"),
    )
    experts = replace(experts, shared_size=fields.integer("shared_expert_intermediate_size"))
    return with_experts(architecture, experts, QWEN_EXPERTS)


FAMILY = Family(
    "qwen2_moe",
    "Qwen1.5-MoE, Qwen2 MoE",
    "mixture of experts beside a shared expert with a gate, biases on q, k and v",
    _read,
)
