"""The names and layouts of GGUF tensors, translated to those of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from dynexport.runtime.bundle.errors import DynexportError

_OUTER = ("model.embed_tokens", "model.norm", "lm_head")
_LLAMA = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_QWEN3 = (*_LLAMA, "self_attn.q_norm", "self_attn.k_norm")
_GEMMA2 = (*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA3 = (*_GEMMA2, "self_attn.q_norm", "self_attn.k_norm")
_OLMO2 = tuple(module for module in _GEMMA3 if module not in ("input_layernorm", "pre_feedforward_layernorm"))
_PHI3 = (
    "input_layernorm",
    "self_attn.qkv_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_up_proj",
    "mlp.down_proj",
)
# Rotary tables and scalings: they belong to the config in Hugging Face's format.
_ROTARY = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufFamily:
    """One ``general.architecture``.

    Attributes:
        architecture: its name in GGUF files.
        class_name: the name of the Hugging Face model class.
        modules: the Hugging Face names of a layer's modules.
        permuted: whether rows of q and k are reordered for ggml's interleaved rotary positions.
        shifted_norms: whether norm weights are stored with 1 added.
        model_type: the family of the Hugging Face model; "" for the architecture's name.
    """

    architecture: str
    class_name: str
    modules: tuple[str, ...] = _LLAMA
    permuted: bool = False
    shifted_norms: bool = False
    model_type: str = ""

    def hugging_face_names(self, stored: Collection[str], layers: int, path: Path) -> dict[str, str]:
        """Return the GGUF name of every stored tensor, by Hugging Face name, except rotary tables.

        Raises:
            DynexportError: when there is a tensor that this family does not have.
        """
        kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[self.architecture]
        translate = gguf.get_tensor_name_map(kind, layers).get_name
        inner = (f"model.layers.{i}.{module}" for i in range(layers) for module in self.modules)
        named = {}
        for module in (*_OUTER, *inner):
            translated = translate(module)
            for suffix in ("weight", "bias"):
                if f"{translated}.{suffix}" in stored:
                    named[f"{module}.{suffix}"] = f"{translated}.{suffix}"
        unknown = sorted(set(stored) - set(named.values()) - set(_ROTARY))
        if unknown:
            raise DynexportError(
                f"{path}: tensor {unknown[0]}: expected the tensors of a plain {self.architecture}, found this one; "
                "convert the Hugging Face directory instead"
            )
        return named

    def to_hugging_face(self, name: str, values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
        """Return the values of a tensor in Hugging Face's layout: the inverse of the conversion to GGUF.

        Args:
            name: the Hugging Face name of the tensor.
            values: the stored values, float32.
            heads: the number of query heads.
            kv_heads: the number of key heads.
        """
        if self.shifted_norms and name.endswith("norm.weight"):
            return values - np.float32(1)
        if self.permuted and ".self_attn.q_proj." in name:
            return _deinterleave(values, heads)
        if self.permuted and ".self_attn.k_proj." in name:
            return _deinterleave(values, kv_heads)
        return values


def _deinterleave(values: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of each head, from the order (0, half, 1, half + 1, ..) back to (0, 1, .., half, half + 1, ..).

    This is the inverse of ``LlamaModel.permute`` in llama.cpp's convert_hf_to_gguf.py.
    """
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


FAMILIES: Mapping[str, GgufFamily] = {
    family.architecture: family
    for family in (
        GgufFamily("llama", "LlamaForCausalLM", permuted=True),
        GgufFamily("smollm3", "SmolLM3ForCausalLM", permuted=True),
        GgufFamily("qwen2", "Qwen2ForCausalLM"),
        GgufFamily("qwen3", "Qwen3ForCausalLM", _QWEN3),
        GgufFamily("gemma", "GemmaForCausalLM", shifted_norms=True),
        GgufFamily("gemma3", "Gemma3ForCausalLM", _GEMMA3, shifted_norms=True, model_type="gemma3_text"),
        GgufFamily("granite", "GraniteForCausalLM", permuted=True),
        GgufFamily("olmo2", "Olmo2ForCausalLM", _OLMO2),
        GgufFamily("gemma2", "Gemma2ForCausalLM", _GEMMA2, shifted_norms=True),
        GgufFamily("phi3", "Phi3ForCausalLM", _PHI3),
    )
}
