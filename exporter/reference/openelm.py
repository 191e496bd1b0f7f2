"""OpenELM (arXiv 2404.14619) in PyTorch, by its checkpoint's names; transformers has no such model."""

from __future__ import annotations

from typing import Any

from dynexport.exporter.reference.plain_modules import rotary, run_layers

OPENELM = "openelm"


def config_and_model() -> tuple[Any, Any]:
    """Return the classes of config and model for registration with transformers."""
    config = _config()
    return config, _model(config)


def _config() -> Any:
    from transformers import PretrainedConfig

    class OpenElmConfig(PretrainedConfig):  # type: ignore[misc]
        model_type = OPENELM
        attribute_map = {"hidden_size": "model_dim", "num_hidden_layers": "num_transformer_layers"}  # noqa: RUF012
        vocab_size: int = 32000
        max_context_length: int = 2048
        num_transformer_layers: int = 12
        model_dim: int = 2048
        head_dim: int = 128
        qkv_multipliers: Any = 1.0
        num_query_heads: Any = None
        num_kv_heads: Any = None
        num_gqa_groups: int = 1
        ffn_multipliers: Any = 4.0
        ffn_with_glu: bool = True
        ffn_dim_divisor: int = 256
        activation_fn_name: str = "swish"
        normalization_layer_name: str = "rms_norm"
        normalize_qk_projections: bool = False
        share_input_output_layers: bool = False
        rope_freq_constant: int = 10000
        rope_max_length: int = 4096
        initializer_range: float = 0.02
        use_cache: bool = True
        bos_token_id: int = 1
        eos_token_id: int = 2

        @property
        def max_position_embeddings(self) -> int:
            return self.max_context_length

    return OpenElmConfig


def _model(config_of_model: Any) -> Any:
    import torch
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class OpenElmForCausalLM(PreTrainedModel):  # type: ignore[misc]
        config_class = config_of_model
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            config.tie_word_embeddings = config.share_input_output_layers
            super().__init__(config)
            self.transformer = torch.nn.ModuleDict(
                {
                    "token_embeddings": torch.nn.Embedding(config.vocab_size, config.model_dim),
                    "layers": torch.nn.ModuleList(_layer(config, i) for i in range(config.num_transformer_layers)),
                    "norm": torch.nn.RMSNorm(config.model_dim, 1e-6),
                }
            )
            self.rotary = rotary(config.rope_freq_constant, config.head_dim)
            self.lm_head = torch.nn.Linear(config.model_dim, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.transformer.token_embeddings

        def get_output_embeddings(self) -> Any:
            return self.lm_head

        def forward(
            self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False, logits_to_keep: Any = 0, **_: Any
        ) -> Any:
            embedded, layers = self.transformer.token_embeddings(input_ids), self.transformer.layers
            hidden_states = run_layers(layers, embedded, self.rotary, attention_mask, use_cache=use_cache)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return CausalLMOutputWithPast(logits=self.lm_head(self.transformer.norm(hidden_states)[:, kept]))

    return OpenElmForCausalLM


def _layer(config: Any, index: int) -> Any:
    import torch

    class Layer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.ffn = _attention(config, index), _mlp(config, index)
            self.attn_norm, self.ffn_norm = (torch.nn.RMSNorm(config.model_dim, 1e-6) for _ in range(2))

        def forward(self, hidden_states: Any, mask: Any, rotation: tuple[Any, Any], cache: Any = None) -> Any:
            hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), mask, rotation, cache)
            return hidden_states + self.ffn(self.ffn_norm(hidden_states))

    return Layer()


def _of_layer(config: Any, name: str, index: int) -> float:
    """Return a layer's factor: that of all layers, one on the line between two, or its own."""
    import numpy as np

    values = getattr(config, name)
    if isinstance(values, int | float):
        return float(values)
    if len(values) == 2:
        first, last = values
        return float(np.round(np.linspace(first, last, config.num_transformer_layers), 2)[index])
    return float(values[index])


def _multiple(value: float, of: int) -> int:
    found = max(of, int((value + of / 2) // of) * of)
    return found if found >= 0.9 * value else found + of


def _attention(config: Any, index: int) -> Any:
    import torch

    class Attention(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            channels = _of_layer(config, "qkv_multipliers", index) * config.model_dim
            self.heads = _multiple(channels, config.head_dim * config.num_gqa_groups) // config.head_dim
            self.kv_heads, self.head_dim = self.heads // config.num_gqa_groups, config.head_dim
            rows = (self.heads + 2 * self.kv_heads) * self.head_dim
            self.qkv_proj = torch.nn.Linear(config.model_dim, rows, bias=False)
            self.out_proj = torch.nn.Linear(self.heads * self.head_dim, config.model_dim, bias=False)
            self.normed = config.normalize_qk_projections
            if self.normed:
                self.q_norm, self.k_norm = (torch.nn.RMSNorm(self.head_dim, 1e-6) for _ in range(2))

        def forward(self, hidden_states: Any, mask: Any, rotation: tuple[Any, Any], cache: Any) -> Any:
            rows, length, _ = hidden_states.shape
            projected = self.qkv_proj(hidden_states).view(rows, length, -1, self.head_dim).transpose(1, 2)
            query, key, value = projected.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
            if self.normed:
                query, key = self.q_norm(query), self.k_norm(key)
            query, key = _turned(query, *rotation), _turned(key, *rotation)
            if cache is not None:
                key, value = cache.update(key, value, index)
            groups = self.heads // self.kv_heads
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            scores = query @ key.transpose(2, 3) * self.head_dim**-0.5 + mask
            attended = scores.softmax(dim=-1) @ value
            return self.out_proj(attended.transpose(1, 2).reshape(rows, length, -1))

    return Attention()


def _mlp(config: Any, index: int) -> Any:
    import torch
    from transformers.activations import ACT2FN

    class Mlp(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            channels = _of_layer(config, "ffn_multipliers", index) * config.model_dim
            inner = _multiple(channels, config.ffn_dim_divisor)
            self.proj_1 = torch.nn.Linear(config.model_dim, 2 * inner, bias=False)
            self.proj_2 = torch.nn.Linear(inner, config.model_dim, bias=False)
            self.activation = ACT2FN[config.activation_fn_name]

        def forward(self, hidden_states: Any) -> Any:
            gate, up = self.proj_1(hidden_states).chunk(2, dim=-1)
            return self.proj_2(self.activation(gate) * up)

    return Mlp()


def _turned(heads: Any, cos: Any, sin: Any) -> Any:
    """Rotate heads [rows, heads, tokens, head_dim], channels i and i + head_dim / 2 together."""
    import torch

    first, second = heads.chunk(2, dim=-1)
    return heads * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


__all__ = ["OPENELM", "config_and_model"]
