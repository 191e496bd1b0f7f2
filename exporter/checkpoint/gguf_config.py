"""The config.json of a GGUF file's Hugging Face model, reconstructed from the metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.gguf_layout import GgufFamily
from dynexport.exporter.checkpoint.gguf_metadata import Metadata
from dynexport.exporter.checkpoint.gguf_variants import family_fields
from dynexport.runtime.bundle.errors import DynexportError

# Constants of llama.cpp that files do not hold (src/llama-model.cpp, src/models/smollm3.cpp).
_DEFAULT_ROPE_BASE = 10000.0
# A constant of transformers' OLMo.
_OLMO_EPSILON = 1e-5
# convert_hf_to_gguf.py computes rope_freqs with these; it ignores the last one of the model's config.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Values that transformers has no counterpart of -> the value that has no effect.
_MULTIPLIERS = {"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def read_config(metadata: Metadata, family: GgufFamily, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Return the fields of config.json.

    Args:
        metadata: the metadata of the file.
        family: the family of its architecture.
        read: a function that returns a tensor by its GGUF name, as float32.

    Raises:
        DynexportError: when a value is missing or of the wrong type, or the model is an unsupported variant.
    """
    if family.experts is None and metadata.optional(metadata.key("expert_count"), int, "an integer"):
        raise metadata.error(metadata.key("expert_count"), f"none in a {family.architecture} without experts")
    config = _sizes(metadata) | _epsilon(metadata, family.epsilon)
    config["architectures"] = [family.class_name]
    config["model_type"] = family.model_type or family.architecture
    config["tie_word_embeddings"] = "output.weight" not in metadata.header.tensors
    config.update(_rope(metadata, config["head_dim"], read))
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.token(name)
    config["pad_token_id"] = metadata.token("padding")
    config.update(family_fields(metadata, config))
    metadata.check_known()
    return config


def _sizes(metadata: Metadata) -> dict[str, Any]:
    heads, hidden = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    embedding = metadata.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DynexportError(
            f"{metadata.header.path}: tensor token_embd.weight: expected a matrix, found none; "
            "name the file of a whole model"
        )
    head_dim = metadata.integer("attention.key_length", max(1, hidden // heads))
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise metadata.error(metadata.key("attention.value_length"), f"{head_dim}, the length of keys")
    if metadata.optional(metadata.key("attention.causal"), bool, "true or false") is False:
        raise metadata.error(metadata.key("attention.causal"), "true")
    return {
        "hidden_size": hidden,
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": metadata.integer("context_length"),
        "hidden_act": "silu",
    }


def _epsilon(metadata: Metadata, field: str | None) -> dict[str, float]:
    """Return the epsilon of norms under its name in config.json; OLMo's is a constant of its code."""
    name = "attention.layer_norm_rms_epsilon" if field == "rms_norm_eps" else "attention.layer_norm_epsilon"
    value = metadata.number(name)
    if value is None or (field is None and not math.isclose(value, _OLMO_EPSILON, rel_tol=1e-5)):
        raise metadata.error(metadata.key(name), "a number" if field else f"{_OLMO_EPSILON:g}")
    return {} if field is None else {field: value}


def _rope(metadata: Metadata, head_dim: int, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Return the rotary fields of config.json that give llama.cpp's computation (src/llama-context.cpp).

    Raises:
        DynexportError: for a scaling together with a table, or another combination that transformers does not have.
    """
    base = metadata.number("rope.freq_base") or _DEFAULT_ROPE_BASE
    dim = metadata.integer("rope.dimension_count", head_dim)
    fields: dict[str, Any] = {"rope_theta": base, "rope_scaling": _scaling(metadata)}
    if dim != head_dim:
        share = dim / head_dim
        fields["partial_rotary_factor"] = share if int(head_dim * share) == dim else math.nextafter(share, 1)
    tables = sorted(name for name in metadata.header.tensors if name.startswith("rope_"))
    if tables and fields["rope_scaling"] is not None:
        raise metadata.error(metadata.key("rope.scaling.factor"), f"none beside the tensor {tables[0]}")
    if tables == ["rope_factors_long.weight", "rope_factors_short.weight"]:
        fields |= _longrope(metadata, *(read(name).tolist() for name in tables))
    elif tables == ["rope_freqs.weight"]:
        fields["rope_scaling"] = _llama3_scaling(metadata, read(tables[0]), base, dim)
    elif tables:
        raise DynexportError(
            f"{metadata.header.path}: tensors of rotary positions: expected rope_freqs.weight, or both of "
            f"rope_factors_long.weight and rope_factors_short.weight, found {', '.join(tables):.200}"
        )
    kind = (fields["rope_scaling"] or {}).get("rope_type")
    if kind not in ("yarn", "longrope") and metadata.number("rope.scaling.attn_factor") not in (None, 1.0):
        raise metadata.error(metadata.key("rope.scaling.attn_factor"), "1 or none for this scaling")
    return fields


def _longrope(metadata: Metadata, long: list[float], short: list[float]) -> dict[str, Any]:
    """Return the fields of longrope; the attention factor is 1 if the file has none, as in llama.cpp."""
    factor = metadata.number("rope.scaling.attn_factor")
    return {
        "rope_scaling": {
            "rope_type": "longrope",
            "long_factor": long,
            "short_factor": short,
            "attention_factor": 1.0 if factor is None else factor,
        },
        "original_max_position_embeddings": metadata.integer("rope.scaling.original_context_length"),
    }


def _scaling(metadata: Metadata) -> dict[str, Any] | None:
    """Return the linear or yarn scaling, which need no table, or None; a file without a type means linear."""
    key = metadata.key("rope.scaling.type")
    kind = metadata.optional(key, str, "a string") or "linear"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise metadata.error(key, "none, linear, yarn or longrope")
    for name, usual in _MULTIPLIERS.items():
        key = metadata.key(f"rope.scaling.{name}")
        if metadata.optional(key, (int, float), "a number") not in (None, usual):
            raise metadata.error(key, f"{usual:g} or none")
    factor = metadata.number("rope.scaling.factor")
    factor = (metadata.number("rope.scale_linear") if factor is None else factor) or 1.0
    if kind == "yarn":
        return _yarn(metadata, factor)
    if kind == "none" or factor == 1.0:
        return None
    if kind == "longrope":
        raise metadata.error(metadata.key("rope.scaling.factor"), "none for longrope, whose factors are tensors")
    return {"rope_type": "linear", "factor": factor}


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = metadata.number("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = int(original)
    for name in ("beta_fast", "beta_slow"):
        value = metadata.number(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = value
    given = metadata.number("rope.scaling.attn_factor")
    if given is not None:  # a multiplier of yarn's own factor, as in llama.cpp
        scaling["attention_factor"] = given * (0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def _llama3_scaling(metadata: Metadata, factors: np.ndarray, base: float, dim: int) -> dict[str, Any]:
    """Return the llama3 scaling that produces a table of per-channel factors [dim / 2].

    Raises:
        DynexportError: when no factor of llama3 scaling gives this table.
    """
    factor = float(factors.max(initial=1.0))
    low, high, context = _LLAMA3_ROPE.values()
    wavelengths = 2 * math.pi * base ** (np.arange(0, dim, 2) / dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise DynexportError(
            f"{metadata.header.path}: tensor rope_freqs.weight: expected the table of llama3 scaling, "
            "found another; convert the Hugging Face directory instead"
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
