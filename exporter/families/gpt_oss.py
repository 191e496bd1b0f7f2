"""gpt-oss: experts with biases and a clamped SwiGLU, attention sinks, windows in every second layer."""

from __future__ import annotations

from dataclasses import replace

from dynexport.exporter.families.architecture import Architecture, Source
from dynexport.exporter.families.experts import every_layer, read_experts, turned, with_experts
from dynexport.exporter.families.family import Family, layer_windows, llama_like
from dynexport.exporter.families.fields import Fields
from dynexport.exporter.families.rope import RopeDefaults

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _of_expert(layer: int, expert: int) -> dict[str, Source]:
    prefix = f"model.layers.{layer}.mlp.experts."
    return {
        f"{part}.{kind}": Source((f"{prefix}{part}{end}",), combine, item=expert)
        for part in ("gate_up_proj", "down_proj")
        for kind, end, combine in (("weight", "", turned), ("bias", "_bias", None))
    }


def _read(fields: Fields) -> Architecture:
    layers, bias = fields.layers("num_hidden_layers"), fields.flag("attention_bias")
    windows = layer_windows(fields, fields.optional_integer("sliding_window"), [i % 2 == 0 for i in range(layers)])
    architecture = llama_like(
        fields,
        rope=RopeDefaults(theta=150000.0, values=_YARN),
        activation="silu",
        qkv_bias=bias,
        attention_output_bias=bias,
        sinks=True,
        windows=windows,
    )
    experts = read_experts(
        fields, size="intermediate_size", count="num_local_experts", layers=every_layer(fields), normalised=True
    )
    experts = replace(
        experts,
        bias=True,
        alpha=fields.number("swiglu_alpha"),
        beta=1.0,
        limit=fields.number("swiglu_limit"),
    )
    fields.get("initial_context_length")  # of rope_parameters, which has it too; transformers does not read it
    fields.only("experts_per_token", experts.chosen, "`num_experts_per_tok`")
    return with_experts(architecture, experts, _of_expert, "mlp.router")


FAMILY = Family(
    "gpt_oss",
    "gpt-oss",
    "mixture of experts with biases and a clamped SwiGLU, attention sinks, alternating windows, MXFP4",
    _read,
    twins={"num_experts": "num_local_experts"},
)
