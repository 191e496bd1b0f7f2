"""Huginn (arXiv 2502.05171) in PyTorch, by its checkpoint's names; a layer runs once, as the strategy adds loops."""

from __future__ import annotations

import math
from typing import Any

from dynexport.exporter.reference.plain_modules import rotary, run_layers

HUGINN = "huginn_raven"


def config_and_model() -> tuple[Any, Any]:
    """Return the classes of config and model for registration with transformers."""
    config = _config()
    return config, _model(config)


def _config() -> Any:
    from transformers import PretrainedConfig

    class HuginnConfig(PretrainedConfig):  # type: ignore[misc]
        model_type = HUGINN
        attribute_map = {"num_attention_heads": "n_heads", "hidden_size": "n_embd", "num_hidden_layers": "n_layers"}  # noqa: RUF012
        n_embd: int = 5280
        n_heads: int = 55
        n_layers: int = 8
        block_size: int = 4096
        vocab_size: int = 65536
        padding_multiple: int = 4096
        tie_embeddings: bool = True
        intermediate_size: int = 17920
        bias: bool = False
        architecture_class_name: str = "RecurrentGPT"
        block_class_name: str = "SandwichBlock"
        norm_class_name: str = "RMSNorm_llama"
        norm_eps: float = 1e-6
        mlp_class_name: str = "GatedMLP"
        nonlin_name: str = "SiLU"
        init_strategy: str = "takase"
        init_orthogonal: bool = False
        state_init: str = "like-init"
        injection_type: str = "linear"
        n_layers_in_recurrent_block: int = 4
        mean_recurrence: int = 32
        sampling_scheme: str = "poisson-lognormal-filling"
        mean_backprop_depth: int = 8
        n_layers_in_prelude: int = 2
        n_layers_in_coda: int = 2
        qk_bias: bool = True
        activation_checkpoint_impl: str = "per-iteration"
        rope_base: float = 50000
        test_time_noise: float = 0
        test_time_noise_type: str = "fixed"
        tie_word_embeddings: bool = True

        @property
        def max_position_embeddings(self) -> int:
            return self.block_size

    return HuginnConfig


def _model(config_of_model: Any) -> Any:
    import torch
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

    class HuginnForCausalLM(PreTrainedModel):  # type: ignore[misc]
        config_class = config_of_model
        base_model_prefix = "model"
        _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
        # The strategy reads the adapter itself; the table of rotary angles is computed anew.
        _keys_to_ignore_on_load_unexpected = [r"transformer\.adapter\.weight", r"freqs_cis"]  # noqa: RUF012

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            parts = {
                "prelude": config.n_layers_in_prelude,
                "core_block": config.n_layers_in_recurrent_block,
                "coda": config.n_layers_in_coda,
            }
            self.layer_names = [f"transformer.{part}.{i}" for part, count in parts.items() for i in range(count)]
            modules: dict[str, Any] = {part: torch.nn.ModuleList() for part in parts}
            for index, name in enumerate(self.layer_names):
                modules[name.split(".")[1]].append(_layer(config, index))
            modules |= {
                "wte": torch.nn.Embedding(config.vocab_size, config.n_embd),
                "ln_f": torch.nn.RMSNorm(config.n_embd, config.norm_eps),
            }
            self.transformer = torch.nn.ModuleDict(modules)
            self.rotary = rotary(config.rope_base, config.n_embd // config.n_heads)
            self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)
            self.post_init()

        def get_input_embeddings(self) -> Any:
            return self.transformer.wte

        def get_output_embeddings(self) -> Any:
            return self.lm_head

        def forward(
            self, input_ids: Any, attention_mask: Any = None, use_cache: bool = False, logits_to_keep: Any = 0, **_: Any
        ) -> Any:
            hidden_states = self.transformer.wte(input_ids) * math.sqrt(self.config.n_embd)
            layers = map(self.get_submodule, self.layer_names)
            hidden_states = run_layers(layers, hidden_states, self.rotary, attention_mask, use_cache=use_cache)
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            return CausalLMOutputWithPast(logits=self.lm_head(self.transformer.ln_f(hidden_states)[:, kept]))

    return HuginnForCausalLM


def _layer(config: Any, index: int) -> Any:
    import torch

    class Layer(torch.nn.Module):  # type: ignore[misc]
        """x + attention, normed; that + MLP, normed."""

        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = _attention(config, index), _mlp(config)
            for number in range(1, 5):
                setattr(self, f"norm_{number}", torch.nn.RMSNorm(config.n_embd, config.norm_eps))

        def forward(self, hidden_states: Any, mask: Any, rotation: tuple[Any, Any], cache: Any = None) -> Any:
            attended = self.attn(self.norm_1(hidden_states), mask, rotation, cache)
            hidden_states = self.norm_2(hidden_states + attended)
            return self.norm_4(hidden_states + self.mlp(self.norm_3(hidden_states)))

    return Layer()


def _attention(config: Any, index: int) -> Any:
    import torch

    class Attention(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.heads = config.n_heads
            self.Wqkv = torch.nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
            self.proj = torch.nn.Linear(config.n_embd, config.n_embd, bias=False)
            if config.qk_bias:
                self.qk_bias = torch.nn.Parameter(torch.zeros(2, 1, config.n_heads, config.n_embd // config.n_heads))

        def forward(self, hidden_states: Any, mask: Any, rotation: tuple[Any, Any], cache: Any) -> Any:
            rows, length, width = hidden_states.shape
            query, key, value = self.Wqkv(hidden_states).view(rows, length, 3, self.heads, -1).unbind(2)
            if config.qk_bias:
                query, key = query + self.qk_bias[0], key + self.qk_bias[1]
            query, key, value = (
                part.transpose(1, 2) for part in (_turned(query, *rotation), _turned(key, *rotation), value)
            )
            if cache is not None:
                key, value = cache.update(key, value, index)
            scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1]) + mask
            attended = scores.softmax(dim=-1) @ value
            return self.proj(attended.transpose(1, 2).reshape(rows, length, width))

    return Attention()


def _turned(heads: Any, cos: Any, sin: Any) -> Any:
    """Rotate neighbouring channels of heads [rows, tokens, heads, head_dim] and put the first of all pairs in front.

    Scores do not depend on the order of channels, and rounded caches have theirs in this one.
    """
    import torch

    half = cos.shape[-1] // 2
    first, second, cos, sin = heads[..., ::2], heads[..., 1::2], cos[:, :, None, :half], sin[:, :, None, :half]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _mlp(config: Any) -> Any:
    import torch

    class Mlp(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
            self.proj = torch.nn.Linear(config.intermediate_size, config.n_embd, bias=False)

        def forward(self, hidden_states: Any) -> Any:
            gate, up = self.fc(hidden_states).chunk(2, dim=-1)
            return self.proj(torch.nn.functional.silu(gate) * up)

    return Mlp()


__all__ = ["HUGINN", "config_and_model"]
