"""The config.json of a GGUF file's Hugging Face model, reconstructed from the metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dynexport.exporter.checkpoint.gguf_header import GgufHeader
from dynexport.exporter.checkpoint.gguf_layout import GgufFamily
from dynexport.runtime.bundle.errors import DynexportError

# Constants of llama.cpp that files do not hold (src/llama-model.cpp, src/models/smollm3.cpp).
_DEFAULT_ROPE_BASE = 10000.0
_SMOLLM3_NO_ROPE_INTERVAL = 4
_GEMMA2_27B_LAYERS = 46
# Defaults for files without these keys, in llama.cpp (src/llama-hparams.h) and in transformers.
_GEMMA2_SOFTCAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_NO_TOKEN = 2**32 - 1
# convert_hf_to_gguf.py computes rope_freqs with these; it ignores the last one of the model's config.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Values that transformers has no counterpart of -> the value that has no effect.
_MULTIPLIERS = {"yarn_ext_factor": -1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}

# Values that these families do not compute with. Those of experts and of a rotary scaling are listed for files that
# have no experts or no scaling; in others they are read.
_WITHOUT_EFFECT = {
    "attention.layer_norm_epsilon",
    "expert_used_count",
    "pooling_type",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "tensor_data_layout",
    "vocab_size",
}


class Metadata:
    """Typed access to the metadata of a GGUF file.

    Args:
        header: the header of the file.

    Attributes:
        header: the header of the file.
        architecture: the value of ``general.architecture``.
        notes: the values that are not used, one line each, for the summary of ``convert``.
    """

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.notes: tuple[str, ...] = ()
        self._values = header.metadata
        self.architecture = str(header.metadata.get("general.architecture"))
        self._asked: set[str] = set()

    def error(self, key: str, expected: str) -> DynexportError:
        """Return an error that names the key, the expected value and the value found."""
        found = f"{self._values[key]!r:.80}" if key in self._values else "nothing"
        return DynexportError(
            f"{self.header.path}: metadata {key}: expected {expected}, found {found}; "
            "convert the Hugging Face directory instead"
        )

    def key(self, name: str) -> str:
        """Return the full key of a value of the architecture."""
        return f"{self.architecture}.{name}"

    def optional(self, key: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """Return the value of a full key, or None; a list of equal values, one per layer, counts as one value."""
        self._asked.add(key)
        value = self._values.get(key)
        if isinstance(value, list) and kind is not list and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise self.error(key, expected)
        return value

    def integer(self, name: str, default: int | None = None) -> int:
        """Return a size of the architecture, greater than 0.

        Raises:
            DynexportError: when it is not an integer > 0, or is absent and has no default.
        """
        key = self.key(name)
        value = self.optional(key, int, "an integer > 0")
        if value is None and default is not None:
            return default
        if value is None or value < 1:
            raise self.error(key, "an integer > 0")
        return int(value)

    def number(self, name: str) -> float | None:
        """Return a finite number >= 0 of the architecture, or None."""
        value = self.finite(self.key(name))
        return None if value is None else float(value)

    def finite(self, key: str) -> int | float | None:
        """Return the finite number >= 0 of a full key, or None."""
        value: int | float | None = self.optional(key, (int, float), "a number")
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise self.error(key, "a finite number >= 0")
        return value

    def check_known(self) -> None:
        """Check that every value of the architecture was read, is known to have no effect, or is false.

        Raises:
            DynexportError: for the first value that may change what the model computes.
        """
        prefix = self.key("")
        for key in sorted(self._values.keys() - self._asked):
            is_off = self._values[key] is False or key.removeprefix(prefix) in _WITHOUT_EFFECT
            if key.startswith(prefix) and not is_off:
                raise self.error(key, "no such value, because it may change what the model computes")

    def token(self, name: str) -> int | None:
        """Return the id of a special token, such as ``bos``; None if it is absent or -1."""
        value = self.optional(f"tokenizer.ggml.{name}_token_id", int, "a token id")
        return None if value in (None, _NO_TOKEN) else int(value)


def read_config(metadata: Metadata, family: GgufFamily, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Return the fields of config.json.

    Args:
        metadata: the metadata of the file.
        family: the family of its architecture.
        read: a function that returns a tensor by its GGUF name, as float32.

    Raises:
        DynexportError: when a value is missing or of the wrong type, or the model is an unsupported variant.
    """
    if metadata.optional(metadata.key("expert_count"), int, "an integer"):
        raise metadata.error(metadata.key("expert_count"), "none: mixtures of experts are not supported")
    config = _sizes(metadata)
    config["architectures"] = [family.class_name]
    config["model_type"] = family.architecture
    config["tie_word_embeddings"] = "output.weight" not in metadata.header.tensors
    config.update(_rope(metadata, config["head_dim"], read))
    for name in ("bos", "eos"):
        config[f"{name}_token_id"] = metadata.token(name)
    config["pad_token_id"] = metadata.token("padding")
    config.update(_specials(metadata, config))
    metadata.check_known()
    return config


def _sizes(metadata: Metadata) -> dict[str, Any]:
    heads, hidden = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    epsilon = metadata.number("attention.layer_norm_rms_epsilon")
    embedding = metadata.header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise DynexportError(
            f"{metadata.header.path}: tensor token_embd.weight: expected a matrix, found none; "
            "name the file of a whole model"
        )
    if epsilon is None:
        raise metadata.error(metadata.key("attention.layer_norm_rms_epsilon"), "a number")
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
        "rms_norm_eps": epsilon,
        "hidden_act": "silu",
    }


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


def _specials(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that are specific to a family."""
    window = metadata.optional(metadata.key("attention.sliding_window"), int, "an integer") or None
    biased = {name for name in metadata.header.tensors if name.startswith("blk.0.") and name.endswith(".bias")}
    kind = config["model_type"]
    if kind == "llama" and window is not None:
        return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}
    context = config["max_position_embeddings"]
    if kind not in ("gemma2", "phi3") and (window or context) < context:
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
    if kind == "gemma2":
        return _gemma2(metadata, config, window)
    if kind == "phi3":
        return {"sliding_window": window}
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in biased}


def _gemma2(metadata: Metadata, config: dict[str, Any], window: int | None) -> dict[str, Any]:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    caps = {name: metadata.number(name) for name in _GEMMA2_SOFTCAPS}
    is_27b = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        **{name: _GEMMA2_SOFTCAPS[name] if cap is None else cap for name, cap in caps.items()},
        "query_pre_attn_scalar": hidden // heads if is_27b else config["head_dim"],
        "sliding_window": window or 4096,
    }
