"""The architectures of GGUF files that are supported: which Hugging Face model each was converted from, and how."""

from __future__ import annotations

from collections.abc import Collection

from dynexport.exporter.checkpoint.gguf_layout import EXPERTS, LAYER, GgufFamily, Place, PlacesOfExperts

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_UP_DOWN = ("mlp.up_proj", "mlp.down_proj")
_LLAMA = (*_NORMS, *_ATTENTION, "mlp.gate_proj", *_UP_DOWN)
_QWEN3 = (*_LLAMA, *_HEAD_NORMS)
_GEMMA2 = (*_LLAMA, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA3 = (*_GEMMA2, *_HEAD_NORMS)
_POST_NORMS = tuple(name for name in _GEMMA3 if name not in ("input_layernorm", "pre_feedforward_layernorm"))
_PHI3 = (*_NORMS, "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
_PHI = ("input_layernorm", *_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
_WIDE = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_FALCON = ("self_attention.query_key_value", "self_attention.dense", *_WIDE)
_H = "transformer.h.{i}."
_FALCON_OUTER = ("transformer.word_embeddings", "transformer.ln_f", "lm_head")
_BLOOM_OUTER = (*_FALCON_OUTER, "transformer.word_embeddings_layernorm")
_SPARSE = (*_NORMS, *_ATTENTION)
_SHARED = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))


def _parts(layer: int, kind: str = "weight") -> list[str]:
    """Return the names of the stored tensors of a layer's experts: gate, up and down."""
    return [f"blk.{layer}.ffn_{part}_exps.{kind}" for part in ("gate", "up", "down")]


def _one_by_one(module: str, *names: str) -> PlacesOfExperts:
    """Return the places of experts that Hugging Face holds one by one, by the names of gate, up and down."""

    def places(layer: int, count: int) -> dict[str, Place]:
        prefix = LAYER.format(i=layer) + module
        return {
            f"{prefix}.{expert}.{name}.weight": Place((stored,), item=expert)
            for expert in range(count)
            for name, stored in zip(names, _parts(layer), strict=True)
        }

    return places


def _granite_experts(layer: int, _: int) -> dict[str, Place]:
    """Return the places of experts whose gate and up are one tensor."""
    prefix, (gate, up, down) = LAYER.format(i=layer) + "block_sparse_moe.", _parts(layer)
    return {f"{prefix}input_linear.weight": Place((gate, up)), f"{prefix}output_linear.weight": Place((down,))}


def _gpt_oss_experts(layer: int, _: int) -> dict[str, Place]:
    """Return the places of transposed experts, whose rows of gate and up take turns, and of attention's sinks."""
    prefix, (gate, up, down) = LAYER.format(i=layer), _parts(layer)
    gate_bias, up_bias, down_bias = _parts(layer, "bias")
    return {
        f"{prefix}mlp.experts.gate_up_proj": Place((gate, up), turns=True, turned=True),
        f"{prefix}mlp.experts.gate_up_proj_bias": Place((gate_bias, up_bias), turns=True),
        f"{prefix}mlp.experts.down_proj": Place((down,), turned=True),
        f"{prefix}mlp.experts.down_proj_bias": Place((down_bias,)),
        f"{prefix}self_attn.sinks": Place((f"blk.{layer}.attn_sinks.weight",)),
    }


_QWEN_EXPERTS = _one_by_one("mlp.experts", "gate_proj", "up_proj", "down_proj")
_MIXTRAL_EXPERTS = _one_by_one("block_sparse_moe.experts", "w1", "w3", "w2")
_ALL = (
    GgufFamily("llama", "LlamaForCausalLM", _LLAMA, permuted=True),
    GgufFamily(
        "llama",
        "MixtralForCausalLM",
        (*_SPARSE, "block_sparse_moe.gate"),
        permuted=True,
        model_type="mixtral",
        experts=_MIXTRAL_EXPERTS,
        marker=EXPERTS.format(i=0),
    ),
    GgufFamily("smollm3", "SmolLM3ForCausalLM", _LLAMA, permuted=True),
    GgufFamily("arcee", "ArceeForCausalLM", (*_SPARSE, *_UP_DOWN), permuted=True),
    GgufFamily("qwen2", "Qwen2ForCausalLM", _LLAMA),
    GgufFamily("qwen3", "Qwen3ForCausalLM", _QWEN3),
    GgufFamily(
        "qwen2moe",
        "Qwen2MoeForCausalLM",
        (*_SPARSE, "mlp.gate", "mlp.shared_expert_gate", *_SHARED),
        model_type="qwen2_moe",
        experts=_QWEN_EXPERTS,
    ),
    GgufFamily(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        (*_SPARSE, *_HEAD_NORMS, "mlp.gate"),
        model_type="qwen3_moe",
        experts=_QWEN_EXPERTS,
    ),
    GgufFamily("gemma", "GemmaForCausalLM", _LLAMA, shifted_norms=True),
    GgufFamily("gemma2", "Gemma2ForCausalLM", _GEMMA2, shifted_norms=True),
    GgufFamily("gemma3", "Gemma3ForCausalLM", _GEMMA3, shifted_norms=True, model_type="gemma3_text"),
    GgufFamily("granite", "GraniteForCausalLM", _LLAMA, permuted=True),
    GgufFamily(
        "granitemoe",
        "GraniteMoeForCausalLM",
        (*_SPARSE, "block_sparse_moe.router.layer"),
        permuted=True,
        experts=_granite_experts,
    ),
    GgufFamily(
        "gpt-oss",
        "GptOssForCausalLM",
        (*_SPARSE, "mlp.router"),
        model_type="gpt_oss",
        experts=_gpt_oss_experts,
    ),
    GgufFamily("olmo", "OlmoForCausalLM", (*_ATTENTION, "mlp.gate_proj", *_UP_DOWN), permuted=True, epsilon=None),
    GgufFamily("olmo2", "Olmo2ForCausalLM", _POST_NORMS),
    GgufFamily("olmoe", "OlmoeForCausalLM", (*_SPARSE, *_HEAD_NORMS, "mlp.gate"), experts=_QWEN_EXPERTS),
    GgufFamily("exaone4", "Exaone4ForCausalLM", _POST_NORMS),
    GgufFamily("seed_oss", "SeedOssForCausalLM", _LLAMA),
    GgufFamily("ernie4_5", "Ernie4_5ForCausalLM", _LLAMA),
    GgufFamily("phi3", "Phi3ForCausalLM", _PHI3),
    GgufFamily(
        "phi2",
        "PhiForCausalLM",
        _PHI,
        ("model.embed_tokens", "model.final_layernorm", "lm_head"),
        model_type="phi",
        epsilon="layer_norm_eps",
    ),
    GgufFamily("starcoder2", "Starcoder2ForCausalLM", (*_SPARSE, "mlp.c_fc", "mlp.c_proj"), epsilon="norm_epsilon"),
    GgufFamily("stablelm", "StableLmForCausalLM", _LLAMA, epsilon="layer_norm_eps"),
    GgufFamily("nemotron", "NemotronForCausalLM", (*_SPARSE, *_UP_DOWN), shifted_norms=True, epsilon="norm_eps"),
    GgufFamily("command-r", "CohereForCausalLM", _LLAMA, model_type="cohere", epsilon="layer_norm_eps"),
    *(
        GgufFamily(
            "falcon",
            "FalconForCausalLM",
            (*_FALCON, *norms),
            _FALCON_OUTER,
            _H,
            ungrouped=True,
            epsilon="layer_norm_epsilon",
            marker=marker,
        )
        for marker, norms in (("", ("input_layernorm",)), ("blk.0.attn_norm_2.weight", ("ln_attn", "ln_mlp")))
    ),
    GgufFamily(
        "bloom",
        "BloomForCausalLM",
        (*_NORMS, *_FALCON),
        _BLOOM_OUTER,
        _H,
        ungrouped=True,
        epsilon="layer_norm_epsilon",
    ),
    GgufFamily(
        "gptneox",
        "GPTNeoXForCausalLM",
        (*_NORMS, "attention.query_key_value", "attention.dense", *_WIDE),
        ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
        "gpt_neox.layers.{i}.",
        ungrouped=True,
        model_type="gpt_neox",
        epsilon="layer_norm_eps",
    ),
)
ARCHITECTURES = tuple(sorted({family.architecture for family in _ALL}))
# The architecture of each family of Hugging Face; a mistral is a llama with a window.
STORED_AS = {family.model_type or family.architecture: family.architecture for family in _ALL} | {"mistral": "llama"}


def family_of(architecture: str, tensors: Collection[str]) -> GgufFamily | None:
    """Return the family of a file from its architecture and the names of its tensors; None for an unsupported one."""
    found = [family for family in _ALL if family.architecture == architecture]
    return next(
        (family for family in found if family.marker in tensors),
        next((family for family in found if not family.marker), None),
    )


__all__ = ["ARCHITECTURES", "STORED_AS", "family_of"]
