"""Models that transformers has no class for, written from their formulas and registered with transformers.

Attention, MLP, masks and rotary positions are transformers' modules; a layer says how they are put together. What a
routing strategy adds, such as further loops, is not here: a model runs each of its layers once.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from dynexport.exporter.reference import huginn, openelm
from dynexport.exporter.reference.own_layers import replace_layers

OURO, NEMOTRON_NAS = "ouro", "nemotron-nas"


@cache
def register(kind: str) -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know a model type, if it is one of this module's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    makers = {
        OURO: _ouro,
        NEMOTRON_NAS: _nemotron_nas,
        huginn.HUGINN: huginn.config_and_model,
        openelm.OPENELM: openelm.config_and_model,
    }
    if kind in makers:
        config, model = makers[kind]()
        AutoConfig.register(kind, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model, exist_ok=True)


def _ouro() -> tuple[Any, Any]:
    """Return config and model of Ouro (arXiv 2510.25741): qwen2 without biases, with a norm after each branch."""
    from torch import nn
    from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2

    class OuroConfig(configuration_qwen2.Qwen2Config):  # type: ignore[misc]
        model_type = OURO
        total_ut_steps: int = 4
        early_exit_threshold: float | None = 1.0
        early_exit_step: int | None = None

    class OuroDecoderLayer(modeling_qwen2.Qwen2DecoderLayer):  # type: ignore[misc]
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            for name in ("q_proj", "k_proj", "v_proj"):
                with_bias = getattr(self.self_attn, name)
                setattr(self.self_attn, name, nn.Linear(with_bias.in_features, with_bias.out_features, bias=False))
            norm = type(self.input_layernorm)
            self.input_layernorm_2 = norm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_attention_layernorm_2 = norm(config.hidden_size, eps=config.rms_norm_eps)

        def forward(self, hidden_states: Any, **others: Any) -> Any:
            attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **others)[0]
            hidden_states = hidden_states + self.input_layernorm_2(attended)
            gated = self.mlp(self.post_attention_layernorm(hidden_states))
            return hidden_states + self.post_attention_layernorm_2(gated)

    class OuroForCausalLM(modeling_qwen2.Qwen2ForCausalLM):  # type: ignore[misc]
        config_class = OuroConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers = nn.ModuleList(OuroDecoderLayer(config, i) for i in range(config.num_hidden_layers))
            self.post_init()

    return OuroConfig, OuroForCausalLM


def _nemotron_nas() -> tuple[Any, Any]:
    """Return config and model of Nemotron-NAS: llama with other sizes in every layer, as ``block_configs`` says."""
    from transformers.models.llama import configuration_llama, modeling_llama

    class NemotronNasConfig(configuration_llama.LlamaConfig):  # type: ignore[misc]
        model_type = NEMOTRON_NAS
        intermediate_size: int | None = None
        num_hidden_layers: int = 1
        block_configs: Any = ({"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 4.0}},)

        def __setattr__(self, name: str, value: Any) -> None:
            # llama's class takes no null; every layer is built again with a width of its own.
            super().__setattr__(name, 1 if name == "intermediate_size" and value is None else value)

    class NemotronNasForCausalLM(modeling_llama.LlamaForCausalLM):  # type: ignore[misc]
        config_class = NemotronNasConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            replace_layers(self, {i: _own_sizes(config, block) for i, block in enumerate(config.block_configs)})
            self.post_init()

    return NemotronNasConfig, NemotronNasForCausalLM


def _own_sizes(config: Any, block: Any) -> dict[str, Any]:
    """Return a block of Nemotron-NAS as the fields of a llama's layer, and what it skips."""
    attention, mlp = block["attention"], block["ffn"]
    own: dict[str, Any] = {"skip": []}
    if attention.get("no_op"):
        own["skip"].append("attention")
    else:
        own["num_key_value_heads"] = config.num_attention_heads // attention["n_heads_in_group"]
    if mlp.get("no_op"):
        return {**own, "intermediate_size": 1, "skip": [*own["skip"], "mlp"]}
    width = mlp.get("intermediate_size") or math.ceil(int(2 * mlp["ffn_mult"] * config.hidden_size / 3) / 256) * 256
    return {**own, "intermediate_size": width}


__all__ = ["register"]
