"""Mixtral: mistral whose MLPs are experts, chosen by a router."""

from __future__ import annotations

from dynexport.exporter.families.architecture import Architecture
from dynexport.exporter.families.experts import every_layer, one_by_one, read_experts, with_experts
from dynexport.exporter.families.family import Family, llama_like, same_window
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults

_EXPERTS = one_by_one("model.layers.{i}.block_sparse_moe.experts.{e}.", "w1", "w3", "w2")


def _read(fields: Fields) -> Architecture:
    architecture = llama_like(
        fields, rope=RopeDefaults(theta=1000000.0), activation="silu", windows=same_window(fields)
    )
    experts = read_experts(
        fields, size="intermediate_size", count="num_local_experts", layers=every_layer(fields), normalised=True
    )
    return with_experts(architecture, experts, _EXPERTS, "block_sparse_moe.gate")


FAMILY = Family(
    "mixtral",
    "Mixtral",
    "mixture of experts, sliding-window attention",
    _read,
    twins={"num_experts": "num_local_experts"},
)
