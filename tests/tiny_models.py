"""Tiny random models of every family, saved as transformers saves them, for all tests that need one."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.reference import own_layers, own_models

LAYERS = 4
VOCABULARY = 97

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
_LLAMA_LIKE = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": None}
_PARTIAL_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_MOST_ROTARY = {**_PARTIAL_ROTARY, "partial_rotary_factor": 0.8}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# One config a family; two multiply cos and sin by a factor. Windows are shorter than the sequences of the tests.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": 5},
    "qwen2": {**_LLAMA_LIKE, "tie_word_embeddings": True, "rope_parameters": _YARN},
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},
    "smollm3": {**_LLAMA_LIKE, "no_rope_layers": [1, 0, 1, 0], "rope_parameters": _YARN},
    "gemma2": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "phi3": {**_LLAMA_LIKE, "rope_parameters": _PARTIAL_ROTARY},
    "ouro": {**_LLAMA_LIKE, "total_ut_steps": 1},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 44,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    },
    "gpt_neox": {**_SIZES, "rope_parameters": _PARTIAL_ROTARY},
    "bloom": {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": VOCABULARY},
}
# Families that differ from one of those above in a few fields; all but the last two are tested in fewer ways.
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 6, "num_experts_per_tok": 2}
_GPTJ = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
EXEMPLARS = (*FAMILIES, "falcon", "granite")
FAMILIES |= {
    "gemma": {**_LLAMA_LIKE, "head_dim": 16},
    "granite": {
        **_LLAMA_LIKE,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 4.0,
    },
    "starcoder2": {**_LLAMA_LIKE, "sliding_window": 5},
    "glm": {**_LLAMA_LIKE, "head_dim": 8},
    "mpt": {"d_model": 32, "n_layers": LAYERS, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCABULARY},
    "glm4": {**_LLAMA_LIKE, "head_dim": 12},
    "ernie4_5": {**_LLAMA_LIKE, "head_dim": 8},
    "olmo2": _LLAMA_LIKE,
    "stablelm": {**_LLAMA_LIKE, "num_attention_heads": 2},
    "falcon": {
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
    },
    "phi": {**_SIZES, "rope_parameters": {**_PARTIAL_ROTARY}},
    "seed_oss": {**_LLAMA_LIKE, "head_dim": 8},
    "ministral": {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 5},
    "olmo": _LLAMA_LIKE,
    "cohere": {**_LLAMA_LIKE, "logit_scale": 0.3},
    "helium": {**_LLAMA_LIKE, "head_dim": 8},
    "gpt_bigcode": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY},
    "exaone4": {**_LLAMA_LIKE, "sliding_window": 5, "sliding_window_pattern": 2},
    "gptj": {**_GPTJ, "rotary_dim": 4},
    "codegen": {**_GPTJ, "rotary_dim": 4},
    "arcee": _LLAMA_LIKE,
    "gemma3_text": {
        **_LLAMA_LIKE,
        "head_dim": 16,
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "query_pre_attn_scalar": 8,
    },
    "olmo3": {
        **_LLAMA_LIKE,
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": _YARN,
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
        },
    },
    "nemotron": _LLAMA_LIKE,
    "openelm": {
        "model_dim": 32,
        "head_dim": 8,
        "num_transformer_layers": LAYERS,
        "num_gqa_groups": 2,
        "qkv_multipliers": [0.5, 1.5],
        "ffn_multipliers": [0.5, 1.0, 1.6, 2.3],
        "ffn_dim_divisor": 20,
        "normalize_qk_projections": True,
        "share_input_output_layers": True,
        "vocab_size": VOCABULARY,
        "max_context_length": 64,
        "rope_max_length": 128,
    },
    "nemotron-nas": {
        **_SIZES,
        "intermediate_size": None,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "block_configs": [
            {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": {"ffn_mult": 1.5, "sparsify": None}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 4, "replace_with_linear": False}, "ffn": {"intermediate_size": 20}},
            {"attention": {"n_heads_in_group": 1}, "ffn": {"no_op": False, "ffn_mult": 13.0}},
        ],
    },
    "qwen3_moe": {**_LLAMA_LIKE, **_EXPERTS, "head_dim": 16, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "qwen2_moe": {
        **_LLAMA_LIKE,
        **_EXPERTS,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
    "mixtral": {**_LLAMA_LIKE, **_LOCAL_EXPERTS, "sliding_window": 5},
    "granitemoe": {
        **_LLAMA_LIKE,
        **_LOCAL_EXPERTS,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "logits_scaling": 4.0,
    },
    "olmoe": {**_LLAMA_LIKE, **_EXPERTS},
    "gpt_oss": {
        **_LLAMA_LIKE,
        **_LOCAL_EXPERTS,
        "head_dim": 16,
        "sliding_window": 5,
        "rope_parameters": {**_YARN, "truncate": False},
        # Reached by single outputs of the tiny experts.
        "swiglu_limit": 1.0,
    },
}
# Families that run with the strategy alone that they declare.
LOOPED: dict[str, dict[str, Any]] = {
    "huginn_raven": {
        "n_embd": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "mean_recurrence": 2,
        "intermediate_size": 44,
        "vocab_size": VOCABULARY,
        "block_size": 64,
    },
}
_LLAMA3_ROTARY = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Heads of 12 channels, which engines may want a multiple of.
_THREE_HEADS = {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1}
# What a family's config can switch on besides: name -> family, config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, {**FAMILIES[family], **fields})
    for name, family, fields in (
        (
            "llama-biases-scaled-rotary",
            "llama",
            {
                "attention_bias": True,
                "mlp_bias": True,
                "head_dim": 16,
                "rope_parameters": _LLAMA3_ROTARY,
                "tie_word_embeddings": True,
            },
        ),
        ("llama-one-kv-head", "llama", {"num_key_value_heads": 1, "head_dim": 24}),
        ("llama-narrow", "llama", {"hidden_size": 40, "head_dim": 10}),
        ("llama-pairs", "llama", {"hidden_size": 12, "num_attention_heads": 6}),
        (
            "qwen2-windows",
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, **_THREE_HEADS},
        ),
        ("qwen3-biases", "qwen3", {"attention_bias": True, "hidden_act": "gelu", "head_dim": 12}),
        (
            "smollm3-windows",
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True, "mlp_bias": True, "head_dim": 6},
        ),
        (
            "gemma2-uncapped",
            "gemma2",
            {"attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 18},
        ),
        ("phi3-window", "phi3", {"sliding_window": 5, "rope_parameters": None, **_THREE_HEADS}),
        ("phi3-wide-heads", "phi3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        # 16 of 20 channels: ONNX Runtime could rotate these itself, but not in heads of 24.
        (
            "phi3-most-channels",
            "phi3",
            {"head_dim": 20, "rope_parameters": {**_PARTIAL_ROTARY, "partial_rotary_factor": 0.8}},
        ),
        ("gpt_neox-wide-heads", "gpt_neox", {"num_attention_heads": 2}),
        ("gpt_neox-one-head", "gpt_neox", {"num_attention_heads": 1}),
        ("smollm3-wide-heads", "smollm3", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("mistral-wide-heads", "mistral", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("mistral-narrow", "mistral", _THREE_HEADS),
        ("gpt2-narrow", "gpt2", {"n_embd": 36, "n_head": 3, "n_inner": 50, "activation_function": "relu"}),
        ("gpt2-untied", "gpt2", {"tie_word_embeddings": False}),
        (
            "opt-plain",
            "opt",
            {
                "enable_bias": False,
                "tie_word_embeddings": False,
                "hidden_size": 25,
                "word_embed_proj_dim": 25,
                "num_attention_heads": 5,
            },
        ),
        (
            "gpt_neox-sequential",
            "gpt_neox",
            {
                "use_parallel_residual": False,
                "attention_bias": False,
                "hidden_size": 36,
                "num_attention_heads": 3,
                # A quarter of 12 channels: 3, of which the last rotates with a fourth.
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
            },
        ),
        ("bloom-six-heads", "bloom", {"hidden_size": 42, "n_head": 6}),
        ("gemma-biases", "gemma", {"attention_bias": True, "tie_word_embeddings": False}),
        ("granite-biases", "granite", {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 1.0}),
        ("starcoder2-plain", "starcoder2", {"use_bias": False, "sliding_window": None}),
        ("glm4-without-biases", "glm4", {"attention_bias": False, "tie_word_embeddings": True}),
        ("ernie4_5-biases", "ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
        ("olmo2-biases", "olmo2", {"attention_bias": True}),
        ("stablelm-parallel", "stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
        (
            "falcon-groups",
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True, "tie_word_embeddings": False},
        ),
        ("falcon-groups-one-norm", "falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
        ("falcon-sequential", "falcon", {"multi_query": False, "parallel_attn": False, "ffn_hidden_size": 44}),
        ("ministral-mixed", "ministral", {"layer_types": ["full_attention", "sliding_attention"] * 2}),
        (
            "mpt-six-heads",
            "mpt",
            {"d_model": 42, "n_heads": 6, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}},
        ),
        ("olmo-clipped", "olmo", {"clip_qkv": 0.5, "attention_bias": True}),
        ("cohere-biases", "cohere", {"attention_bias": True, "tie_word_embeddings": False}),
        ("gpt_bigcode-many-keys", "gpt_bigcode", {"multi_query": False}),
        ("exaone4-full", "exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * LAYERS}),
        (
            "gemma3_text-scaled-rotary",
            "gemma3_text",
            {
                "attention_bias": True,
                "layer_types": None,
                "sliding_window_pattern": 2,
                "rope_parameters": None,
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                "rope_theta": 100.0,
                "rope_local_base_freq": 10.0,
                "final_logit_softcapping": 5.0,
            },
        ),
        ("nemotron-biases", "nemotron", {"attention_bias": True, "mlp_bias": True}),
        (
            "qwen2_moe-windows",
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True, "decoder_sparse_step": 2},
        ),
        ("olmoe-clipped", "olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
        ("phi-groups", "phi", {"num_key_value_heads": 2, "rope_parameters": None}),
        (
            "llama-own-layers",
            "llama",
            {
                "head_dim": 8,
                "per_layer_config": {
                    "0": {"skip": ["attention"], "intermediate_size": 20},
                    "01": {"num_key_value_heads": 4, "skip": ["mlp"]},
                    "2": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 60},
                },
            },
        ),
        (
            "mistral-own-layers",
            "mistral",
            {"per_layer_config": {"1": {"sliding_window": 3}, "2": {"sliding_window": None, "skip": ["mlp"]}}},
        ),
        (
            "qwen2-own-layers",
            "qwen2",
            {"per_layer_config": {"1": {"skip": ["mlp", "attention"]}, "3": {"num_key_value_heads": 1}}},
        ),
        (
            "qwen3-own-layers",
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "max_window_layers": 2,
                "per_layer_config": {"0": {"num_key_value_heads": 4}, "3": {"sliding_window": 2, "skip": ["mlp"]}},
            },
        ),
    )
}


def save_model(directory: Path, family: str, config: dict[str, Any]) -> None:
    """Save a model with random weights. Biases and norms are random too, so that a forgotten one shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    own_models.register(family)
    torch.manual_seed(0)
    given, config = config, dict(config)
    own = config.pop(own_layers.FIELD, {})
    full = AutoConfig.for_model(family, **{"bos_token_id": 1, "eos_token_id": 2, **config})
    model = AutoModelForCausalLM.from_config(full, dtype=torch.float32)
    as_saved = copy.deepcopy(full)
    own_layers.replace_layers(model, own_layers.own_fields({own_layers.FIELD: own}))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    if own or family == "nemotron-nas":  # transformers writes other sizes than those it was given
        (directory / "config.json").write_text(json.dumps({**as_saved.to_dict(), **given}))


def save_routed_model(directory: Path, model: Path, *, seed: int = 7) -> None:
    """Save a copy of a model with a random router and predictor for every layer; two of them are declared as routed.

    As it stands it is refused for the routers that nobody reads: a test names the layers that it wants.

    Scores come out on both sides of 0, so that decisions vary from token to token.
    """
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    hidden = config.get("hidden_size") or config["n_embd"]
    generator = np.random.default_rng(seed)
    tensors = load_file(directory / "model.safetensors")
    tensors |= mod_tensors(range(LAYERS), hidden, generator)
    save_file(tensors, directory / "model.safetensors")
    config["dynexport"] = {"strategy": "mod", "routed_layers": [1, 3]}
    (directory / "config.json").write_text(json.dumps(config))


def save_radial_model(directory: Path, model: Path, **fields: Any) -> Path:
    """Save a copy of a model with a random router, declared as radial with these fields of the contract."""
    shutil.copytree(model, directory)
    config = json.loads((directory / "config.json").read_text())
    hidden = config.get("hidden_size") or config["n_embd"]
    contract = {"strategy": "radial", "max_steps": 5, "router": {"hidden": 8}, **fields}
    (directory / "config.json").write_text(json.dumps(config | {"dynexport": contract}))
    choices = LAYERS + contract.get("exit", True)
    random = np.random.default_rng(5)
    shapes = {"norm.weight": (hidden,), "fc1.weight": (8, hidden), "fc1.bias": (8,)}
    shapes |= {"fc2.weight": (choices, 8), "fc2.bias": (choices,)}
    tensors = load_file(directory / "model.safetensors")
    for name, shape in shapes.items():
        value = random.standard_normal(shape, np.float32) * np.float32(0.7) + (name == "norm.weight")
        tensors[f"model.radial_router.{name}"] = value.astype(np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def mod_tensors(layers: Iterable[int], hidden: int, generator: np.random.Generator) -> dict[str, np.ndarray]:
    """A random router and predictor for each of these layers, under the routing contract's names."""
    shapes = {
        "mod_router.weight": (1, hidden),
        "mod_router.bias": (1,),
        "mod_predictor.fc1.weight": (6, hidden),
        "mod_predictor.fc1.bias": (6,),
        "mod_predictor.fc2.weight": (1, 6),
        "mod_predictor.fc2.bias": (1,),
    }
    return {
        f"model.layers.{layer}.{name}": generator.normal(0, 0.3, shape).astype(np.float32)
        for layer in layers
        for name, shape in shapes.items()
    }


class InMemory(Checkpoint):
    """A saved model whose tensors can be changed before they are read.

    Attributes:
        tensors: by name.
    """

    def __init__(self, directory: Path) -> None:
        self.source = str(directory)
        self.config = json.loads((directory / "config.json").read_text())
        self.files = {}
        self.tensors: dict[str, np.ndarray] = load_file(directory / "model.safetensors")
        self.hidden = self.config.get("hidden_size") or self.config["n_embd"]

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name].astype(np.float32)


def random_rows(*lengths: int, vocabulary: int = VOCABULARY, seed: int = 3) -> list[list[int]]:
    """Rows of random token ids."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length).tolist() for length in lengths]
