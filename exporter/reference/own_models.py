"""Models that transformers has no class for, written from their formulas and registered with transformers.

Attention, MLP, masks and rotary positions are transformers' modules; a layer says how they are put together. What a
routing strategy adds, such as further loops, is not here: a model runs each of its layers once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from dynexport.exporter.reference.huginn import HUGINN, config_and_model

OURO = "ouro"


@cache
def register() -> None:
    """Make ``AutoConfig`` and ``AutoModelForCausalLM`` know the models of this module."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind, (config, model) in {OURO: _ouro(), HUGINN: config_and_model()}.items():
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


__all__ = ["register"]
