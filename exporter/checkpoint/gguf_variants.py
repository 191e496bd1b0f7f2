"""The fields of config.json that only one family has, from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynexport.exporter.checkpoint.gguf_metadata import Metadata

# Constants of llama.cpp that files do not hold (src/llama-model.cpp, src/models).
_SMOLLM3_NO_ROPE_INTERVAL = 4
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
_GEMMA3_WINDOWS_IN = 6
_LOCAL_ROPE_BASE = 10000.0
# Defaults for files without these keys, in llama.cpp (src/llama-hparams.h) and in transformers.
_GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def family_fields(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are specific to a family."""
    window = metadata.optional(metadata.key("attention.sliding_window"), int, "an integer") or None
    biased = {name for name in metadata.header.tensors if name.startswith("blk.0.") and name.endswith(".bias")}
    kind = config["model_type"]
    if kind == "llama" and window is not None:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    context = config["max_position_embeddings"]
    if kind not in ("gemma2", "gemma3_text", "phi3") and (window or context) < context:
        # llama.cpp (src/models) and transformers do not use the window of these families either.
        metadata.notes += (
            f"{metadata.key('attention.sliding_window')} is not used, as in llama.cpp: attention has no window",
        )
    if kind in ("llama", "smollm3"):
        fields: dict[str, Any] = {
            "attention_bias": "blk.0.attn_q.bias" in biased,
            "mlp_bias": "blk.0.ffn_up.bias" in biased,
        }
        if kind == "smollm3":
            layers = range(1, config["num_hidden_layers"] + 1)
            fields["no_rope_layers"] = [int(i % _SMOLLM3_NO_ROPE_INTERVAL != 0) for i in layers]
        return fields
    if kind in _FIELDS_OF:
        return _FIELDS_OF[kind](metadata, config, window)
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in biased}


def _gemma(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}


def _gemma_with_windows(
    config: dict[str, Any], caps: Mapping[str, float | None], layers_of_27b: int, window: int
) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    is_27b = config["num_hidden_layers"] == layers_of_27b
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        **caps,
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "sliding_window": window,
    }


def _gemma2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    found = {name: metadata.number(name) for name in _GEMMA2_SOFTCAPS}
    caps = {name: _GEMMA2_SOFTCAPS[name] if cap is None else cap for name, cap in found.items()}
    return _gemma_with_windows(config, caps, _GEMMA2_27B_LAYERS, window or 4096)


def _gemma3(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the fields of gemma3_text; a scaling of rotary positions is that of layers without a window."""
    if window is None:
        raise metadata.error(metadata.key("attention.sliding_window"), "an integer > 0")
    if not metadata.number("rope.freq_base"):
        raise metadata.error(metadata.key("rope.freq_base"), "a number > 0")
    caps = {"final_logit_softcapping": metadata.number("final_logit_softcapping") or None}
    return {
        **_gemma_with_windows(config, caps, _GEMMA3_27B_LAYERS, window),
        "sliding_window_pattern": _GEMMA3_WINDOWS_IN,
        "rope_local_base_freq": _LOCAL_ROPE_BASE,
    }


def _granite(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the multipliers, 1 where the file has none, and the scale of scores, 0 or absent for the usual one."""
    biased = "blk.0.attn_q.bias" in metadata.header.tensors
    scales = {
        "embedding_multiplier": metadata.number("embedding_scale"),
        "residual_multiplier": metadata.number("residual_scale"),
        "logits_scaling": metadata.number("logit_scale"),
    }
    fields: dict[str, Any] = {name: 1.0 if value is None else value for name, value in scales.items()}
    fields["attention_multiplier"] = metadata.number("attention.scale") or config["head_dim"] ** -0.5
    return {**fields, "attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in metadata.header.tensors}


def _olmo2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    if window is not None:
        raise metadata.error(metadata.key("attention.sliding_window"), "none, as in OLMo 2")
    return {"attention_bias": False}


def _phi3(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"sliding_window": window}


_FIELDS_OF: dict[str, Callable[[Metadata, dict[str, Any], int | None], dict[str, Any]]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "granite": _granite,
    "olmo2": _olmo2,
    "phi3": _phi3,
}
