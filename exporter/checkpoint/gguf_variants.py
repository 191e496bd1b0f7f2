"""The fields of config.json that only one family has, from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dynexport.exporter.checkpoint.gguf_layout import EXPERTS
from dynexport.exporter.checkpoint.gguf_metadata import Metadata

# Constants of llama.cpp that files do not hold (src/llama-model.cpp, src/models).
_SMOLLM3_NO_ROPE_INTERVAL = 4
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
_GEMMA3_WINDOWS_IN = 6
_LOCAL_ROPE_BASE = 10000.0
_EXAONE4_32B_LAYERS, _EXAONE4_WINDOW, _EXAONE4_WINDOWS_IN = 64, 4096, 4
# Families whose windows are in the file and used; in starcoder2 they are not in the file.
_WITH_WINDOWS = ("exaone4", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "phi3", "starcoder2")
# Defaults for files without these keys, in llama.cpp (src/llama-hparams.h) and in transformers.
_GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def family_fields(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are specific to a family."""
    window = metadata.optional(metadata.key("attention.sliding_window"), int, "an integer") or None
    kind = config["model_type"]
    if kind == "llama" and window is not None:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    context = config["max_position_embeddings"]
    if kind not in _WITH_WINDOWS and (window or context) < context:
        # llama.cpp (src/models) and transformers do not use the window of these families either.
        metadata.notes += (
            f"{metadata.key('attention.sliding_window')} is not used, as in llama.cpp: attention has no window",
        )
    return _FIELDS_OF.get(kind, _qwen)(metadata, config, window)


def _has(metadata: Metadata, name: str) -> bool:
    """Return whether the first layer has a tensor."""
    return f"blk.0.{name}" in metadata.header.tensors


def _biases(metadata: Metadata) -> dict[str, Any]:
    return {"attention_bias": _has(metadata, "attn_q.bias"), "mlp_bias": _has(metadata, "ffn_up.bias")}


def _qwen(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": _has(metadata, "attn_q.bias")}


def _llama(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return _biases(metadata)


def _smollm3(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    layers = range(1, config["num_hidden_layers"] + 1)
    return {**_biases(metadata), "no_rope_layers": [int(i % _SMOLLM3_NO_ROPE_INTERVAL != 0) for i in layers]}


def _relu2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the fields of arcee and nemotron, whose MLPs have no gate."""
    return {**_biases(metadata), **_rotated(config), "hidden_act": "relu2"}


def _rotated(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotated share of a head's channels, for families whose class rotates fewer by default."""
    return {"partial_rotary_factor": config.get("partial_rotary_factor", 1.0)}


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
    scales = {
        "embedding_multiplier": metadata.number("embedding_scale"),
        "residual_multiplier": metadata.number("residual_scale"),
        "logits_scaling": metadata.number("logit_scale"),
    }
    fields: dict[str, Any] = {name: 1.0 if value is None else value for name, value in scales.items()}
    fields["attention_multiplier"] = metadata.number("attention.scale") or config["head_dim"] ** -0.5
    return {**fields, **_biases(metadata)}


def _olmo2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    if window is not None:
        raise metadata.error(metadata.key("attention.sliding_window"), "none, as in OLMo 2")
    return {"attention_bias": False}


def _phi3(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"sliding_window": window}


def _exaone4(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the windows: those of the file's list of layers, or of llama.cpp's for the one size that has windows."""
    layers, is_32b = config["num_hidden_layers"], config["num_hidden_layers"] == _EXAONE4_32B_LAYERS
    if window is None and is_32b:
        window = _EXAONE4_WINDOW
    sliding = _sliding(metadata, layers, [is_32b and (i + 1) % _EXAONE4_WINDOWS_IN != 0 for i in range(layers)])
    if not any(sliding):
        return {"sliding_window": None, "layer_types": ["full_attention"] * layers}
    return {"sliding_window": window, "layer_types": _kinds(sliding)}


def _sliding(metadata: Metadata, layers: int, usual: list[bool]) -> list[bool]:
    """Return whether each layer has a window: the file's list, or ``usual`` without one."""
    key = metadata.key("attention.sliding_window_pattern")
    found = metadata.optional(key, list, f"true or false for each of {layers} layers")
    if found is None:
        return usual
    if len(found) != layers or not all(isinstance(slides, bool) for slides in found):
        raise metadata.error(key, f"true or false for each of {layers} layers")
    return list(found)


def _kinds(sliding: list[bool]) -> list[str]:
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _starcoder2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    metadata.notes += (
        "attention has no window, as in llama.cpp: files of a starcoder2 do not hold that of the original model, so "
        "texts longer than it (4096 tokens in the published models) get other results than there",
    )
    use_bias = _has(metadata, "attn_q.bias")
    return {"use_bias": use_bias, "sliding_window": None, "hidden_act": "gelu_pytorch_tanh"}


def _stablelm(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the layout of a layer: in parallel where there is no norm before the MLP, as llama.cpp decides it."""
    metadata.optional(metadata.key("use_parallel_residual"), bool, "true or false")
    parallel, biased = not _has(metadata, "ffn_norm.weight"), _has(metadata, "attn_q.bias")
    return {"use_parallel_residual": parallel, "use_qkv_bias": biased, **_rotated(config)}


def _phi(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {**_rotated(config), "hidden_act": "gelu_new"}


def _cohere(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    scale = metadata.number("logit_scale")
    if not scale:
        raise metadata.error(metadata.key("logit_scale"), "a number > 0")
    return {"logit_scale": scale, "attention_bias": _has(metadata, "attn_q.bias")}


def _olmo(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"attention_bias": False, "clip_qkv": metadata.number("attention.clamp_kqv") or None}


def _seed_oss(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {**_biases(metadata), "attention_out_bias": _has(metadata, "attn_output.bias")}


def _ernie(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"use_bias": _has(metadata, "attn_q.bias")}


def _falcon(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the layout of a layer: attention and MLP in parallel, which is all that llama.cpp has."""
    two, kv_heads = _has(metadata, "attn_norm_2.weight"), config["num_key_value_heads"]
    return {
        "new_decoder_architecture": two or kv_heads != 1,
        "num_ln_in_parallel_attn": 2 if two else 1,
        "multi_query": kv_heads == 1,
        "num_kv_heads": kv_heads,
        "parallel_attn": True,
        "alibi": False,
        "bias": _has(metadata, "attn_qkv.bias"),
        "ffn_hidden_size": config["intermediate_size"],
        "hidden_act": None,
        "activation": "gelu",
    }


def _bloom(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {"rope_theta": None, "hidden_act": None}


def _gpt_neox(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    parallel = metadata.optional(metadata.key("use_parallel_residual"), bool, "true or false")
    return {
        "use_parallel_residual": parallel is not False,
        "attention_bias": _has(metadata, "attn_qkv.bias"),
        "hidden_act": "gelu",
        "rotary_pct": config.get("partial_rotary_factor", 1.0),
        "partial_rotary_factor": None,
        "rotary_emb_base": config["rope_theta"],
        "rope_theta": None,
    }


def _experts(metadata: Metadata, count: str) -> dict[str, Any]:
    """Return the numbers of experts, and of those that run for a token; the router's function is softmax."""
    key = metadata.key("expert_gating_func")
    if metadata.optional(key, int, "1, softmax") not in (None, 1):
        raise metadata.error(key, "1, softmax")
    stored, found = metadata.header.tensors[EXPERTS.format(i=0)].shape[0], metadata.integer("expert_count")
    if found != stored:
        raise metadata.error(metadata.key("expert_count"), f"{stored}, as its tensors have")
    return {count: found, "num_experts_per_tok": metadata.integer("expert_used_count")}


def _normalised(metadata: Metadata, usual: bool) -> dict[str, Any]:
    """Return whether the chosen experts' weights are divided by their sum, which llama.cpp knows of each family."""
    key = metadata.key("expert_weights_norm")
    if metadata.optional(key, bool, str(usual).lower()) not in (None, usual):
        raise metadata.error(key, str(usual).lower())
    return {"norm_topk_prob": usual}


def _mixtral(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {**_experts(metadata, "num_local_experts"), "sliding_window": window}


def _qwen_moe(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    fields = _experts(metadata, "num_experts")
    usual = max(1, config["intermediate_size"] // int(fields["num_experts_per_tok"]))
    fields |= {
        "moe_intermediate_size": metadata.integer("expert_feed_forward_length", usual),
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if config["model_type"] == "qwen3_moe":
        return {**fields, **_normalised(metadata, True), "attention_bias": _has(metadata, "attn_q.bias")}
    shared = metadata.integer("expert_shared_feed_forward_length", config["intermediate_size"])
    own = {"shared_expert_intermediate_size": shared, "qkv_bias": _has(metadata, "attn_q.bias")}
    return {**fields, **_normalised(metadata, False), **own}


def _olmoe(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    clip = metadata.number("attention.clamp_kqv") or None
    return {**_experts(metadata, "num_experts"), **_normalised(metadata, False), "clip_qkv": clip}


def _granitemoe(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    return {**_granite(metadata, config, window), **_experts(metadata, "num_local_experts")}


def _gpt_oss(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return the experts and windows; the file's numbers of yarn are used without rounding, as OpenAI's code does."""
    layers, scaling = config["num_hidden_layers"], config["rope_scaling"]
    if window is None:
        raise metadata.error(metadata.key("attention.sliding_window"), "an integer > 0")
    return {
        **_experts(metadata, "num_local_experts"),
        "intermediate_size": metadata.integer("expert_feed_forward_length"),
        "attention_bias": _has(metadata, "attn_q.bias"),
        "sliding_window": window,
        "layer_types": _kinds(_sliding(metadata, layers, [i % 2 == 0 for i in range(layers)])),
        "rope_scaling": scaling and {**scaling, "truncate": False},
    }


# The fields of a family, from its metadata, the fields that all have, and the window in the file.
_Fields = Callable[[Metadata, dict[str, Any], int | None], dict[str, Any]]
_FIELDS_OF: dict[str, _Fields] = {
    "arcee": _relu2,
    "bloom": _bloom,
    "cohere": _cohere,
    "ernie4_5": _ernie,
    "exaone4": _exaone4,
    "falcon": _falcon,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt_neox": _gpt_neox,
    "gpt_oss": _gpt_oss,
    "granite": _granite,
    "granitemoe": _granitemoe,
    "llama": _llama,
    "mixtral": _mixtral,
    "nemotron": _relu2,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "seed_oss": _seed_oss,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
