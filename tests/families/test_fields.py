"""Reading config.json: what is understood, what is refused, and that nothing else happens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, LAYERS, VARIANTS

from dynexport.exporter.families import asked_fields, families, read_architecture
from dynexport.exporter.families.architecture import Architecture, Rotary
from dynexport.exporter.families.fields import ACTIVATIONS
from dynexport.exporter.reference import own_models
from dynexport.runtime.bundle.errors import DynexportError

MISSING = object()
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


def config(family: str, **fields: Any) -> dict[str, Any]:
    """A family's tiny config with some fields changed; MISSING takes one away."""
    changed = {"model_type": family, **FAMILIES[family], **fields}
    return {name: value for name, value in changed.items() if value is not MISSING}


def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(DynexportError) as caught:
        read_architecture(fields)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("model_type", ["mamba", "LLAMA", "", None, 3, ["llama"], {"llama": 1}, MISSING])
def test_an_unknown_family_is_refused(model_type: Any) -> None:
    message = refused(config("llama", model_type=model_type))
    assert "model_type" in message and ", ".join(sorted(families())) in message
    assert repr(None if model_type is MISSING else model_type) in message


UNSUPPORTED = [
    *[(family, "is_causal", False) for family in FAMILIES],
    ("llama", "hidden_act", "relu6"),
    ("llama", "partial_rotary_factor", 0.5),
    ("mistral", "layer_types", ["sliding_attention", "full_attention"] * 2),
    ("qwen2", "layer_types", ["chunked_attention"] * LAYERS),
    ("qwen3", "hidden_act", "xielu"),
    ("smollm3", "no_rope_layers", [1, 0]),
    ("smollm3", "no_rope_layers", [1, 0, 1, 2]),
    ("gemma2", "attention_bias", True),
    ("gemma2", "use_bidirectional_attention", True),
    ("gemma2", "hidden_activation", "quick_gelu"),
    ("phi3", "attention_bias", True),
    ("phi3", "layer_types", ["sliding_attention"] * LAYERS),
    ("phi3", "lm_head_bias", True),
    ("llama", "layer_types", ["sliding_attention"] * LAYERS),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "add_cross_attention", True),
    ("gpt2", "activation_function", "tanh"),
    ("opt", "do_layer_norm_before", False),
    ("opt", "word_embed_proj_dim", 16),
    ("opt", "_remove_final_layer_norm", True),
    ("opt", "layer_norm_elementwise_affine", False),
    ("gpt_neox", "hidden_act", "gelu_10"),
    ("bloom", "apply_residual_connection_post_layernorm", True),
    ("gemma", "hidden_activation", "gelu"),
    ("gemma", "use_bidirectional_attention", True),
    ("falcon", "alibi", True),
    ("falcon", "num_ln_in_parallel_attn", 2),
    ("granite", "residual_multiplier", -1),
    ("phi", "qk_layernorm", True),
    ("phi", "tie_word_embeddings", True),
    ("stablelm", "qk_layernorm", True),
    ("cohere", "use_qk_norm", True),
    ("codegen", "n_head", 2),
    ("codegen", "rotary_dim", 3),
    ("gptj", "rotary_dim", None),
    ("gptj", "tie_word_embeddings", True),
    ("gpt_bigcode", "scale_attn_weights", False),
    ("nemotron", "hidden_act", "xielu"),
    ("olmo", "clip_qkv", -1),
    ("ministral", "layer_types", ["chunked_attention"] * LAYERS),
    ("gemma3_text", "attn_logit_softcapping", 50.0),
    ("gemma3_text", "rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
    ("gemma3_text", "rope_parameters", {"full_attention": [1]}),
    ("olmo3", "rope_scaling", {"kind": 2}),
    ("olmo3", "partial_rotary_factor", 0.5),
    ("ernie4_5", "partial_rotary_factor", 0.5),
]


@pytest.mark.parametrize(("family", "field", "value"), UNSUPPORTED)
def test_an_unsupported_value_is_refused_by_name(family: str, field: str, value: Any) -> None:
    message = refused(config(family, **{field: value}))
    assert f"({family}): {field}: expected" in message and repr(value) in message


REQUIRED = {
    "gpt2": ("n_embd", "n_layer", "n_head", "vocab_size"),
    "bloom": ("hidden_size", "n_layer", "n_head", "vocab_size"),
    "falcon": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    **dict.fromkeys(("gpt_bigcode", "gptj", "codegen"), ("n_embd", "n_layer", "n_head", "vocab_size")),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "vocab_size"),
    "openelm": ("model_dim", "num_transformer_layers", "head_dim", "vocab_size"),
    "mpt": ("d_model", "n_heads", "n_layers", "max_seq_len", "vocab_size"),
    "nemotron-nas": ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
}
USUAL = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
SIZE_FIELDS = [(family, field) for family in FAMILIES for field in REQUIRED.get(family, USUAL)]


@pytest.mark.parametrize(("family", "field"), SIZE_FIELDS)
@pytest.mark.parametrize("value", [None, "32", True, 32.0, 0, -1, 1 << 4000, [32]])
def test_a_size_is_one(family: str, field: str, value: Any) -> None:
    message = refused(config(family, **{field: value}))
    assert f"{field}: expected an integer" in message
    assert f"found {value!r:.200}" in message


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "rms_norm_eps", "1e-6"),
        ("llama", "rms_norm_eps", 0),
        ("llama", "rms_norm_eps", math.nan),
        ("llama", "rms_norm_eps", 10**100),
        ("llama", "rope_theta", math.inf),
        ("llama", "rope_theta", -1e4),
        ("llama", "rope_scaling", "linear"),
        ("llama", "attention_bias", "false"),
        ("llama", "mlp_bias", 0),
        ("llama", "tie_word_embeddings", []),
        ("llama", "hidden_act", ["silu"]),
        ("llama", "hidden_size", 33),
        ("llama", "num_key_value_heads", 3),
        ("llama", "num_hidden_layers", 5000),
        ("mistral", "sliding_window", -5),
        ("qwen2", "use_sliding_window", "yes"),
        ("qwen2", "layer_types", [["sliding_attention"]] * LAYERS),
        ("qwen2", "max_window_layers", -1),
        ("smollm3", "no_rope_layers", "1010"),
        ("gemma2", "final_logit_softcapping", 0.0),
        ("gemma2", "query_pre_attn_scalar", -8),
        ("gpt2", "n_inner", "128"),
        ("gpt2", "layer_norm_epsilon", True),
        ("opt", "enable_bias", "no"),
        ("gpt_neox", "use_parallel_residual", "parallel"),
        ("bloom", "layer_norm_epsilon", {}),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_by_name(family: str, field: str, value: Any) -> None:
    message = refused(config(family, **{field: value}))
    assert f"({family}): {field}: expected" in message and repr(value) in message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, -1, 1 << 31, 10**400, 1e-300, 1e300, "silu", "default", "linear", "llama3"])
    | st.floats()
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=LAYERS)
        | st.dictionaries(st.sampled_from(["rope_type", "type", "rope_theta", *LLAMA3]) | st.text(max_size=4), inner)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_json_is_read_or_refused(family: str, data: st.DataObject) -> None:
    known = sorted(asked_fields(config(family)))
    values = data.draw(st.dictionaries(st.sampled_from(known), JSON, max_size=3))
    try:
        assert isinstance(read_architecture(config(family, **values)), Architecture)
    except DynexportError as error:
        assert "\n" not in str(error)
        assert any(field in str(error) for field in (*known, "rope_type", "rope_theta", *LLAMA3))


def same(a: Architecture, b: Architecture) -> None:
    """Equal but for functions, and for rotary frequencies to the last digits."""
    for field in dataclasses.fields(Architecture):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "sources":
            assert {name: source.names for name, source in left.items()} == {
                name: source.names for name, source in right.items()
            }
        elif isinstance(left, Rotary):
            assert (left.dim, left.rope_type) == (right.dim, right.rope_type)
            np.testing.assert_allclose(left.inverse_frequencies, right.inverse_frequencies, rtol=1e-12)
        else:
            assert left == right, field.name


# transformers has no class for nemotron-nas, and writes no config of all fields where the number of heads differs.
@pytest.mark.parametrize("name", sorted({*FAMILIES, *VARIANTS} - {"nemotron-nas", "llama-own-layers"}))
def test_a_short_config_means_what_transformers_makes_of_it(name: str, saved_model: Callable[[str], Path]) -> None:
    """The few fields that a test or an old checkpoint has, against all those that save_pretrained writes."""
    transformers = pytest.importorskip("transformers")
    family, fields = VARIANTS.get(name, (name, FAMILIES.get(name, {})))
    saved = transformers.AutoConfig.from_pretrained(saved_model(name)).to_dict()
    same(read_architecture({"model_type": family, **fields}), read_architecture(saved))


@pytest.mark.parametrize("family", sorted({*families()} - {"nemotron-nas"}))  # without its blocks it is no model
def test_an_empty_config_means_what_transformers_makes_of_it(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    own_models.register(family)
    default = transformers.AutoConfig.for_model(family).to_dict()
    same(read_architecture({"model_type": family}), read_architecture(default))


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        (
            "llama",
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        ),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        ),
        (
            "phi3",
            {"rope_theta": 1e5, "partial_rotary_factor": 0.75, "rope_parameters": MISSING, "hidden_size": 64},
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.75},
                "hidden_size": 64,
            },
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 5000, "rotary_pct": 0.5, "rope_parameters": MISSING},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5}},
        ),
        (
            "smollm3",
            {"use_sliding_window": True, "sliding_window": 5},
            {
                "use_sliding_window": True,
                "sliding_window": 5,
                "layer_types": ["full_attention", "sliding_attention"] * 2,
            },
        ),
        (
            "gemma2",
            {"hidden_act": "gelu_pytorch_tanh"},
            {"hidden_activation": "gelu_pytorch_tanh", "layer_types": ["sliding_attention", "full_attention"] * 2},
        ),
        ("gpt2", {"hidden_size": 32, "n_embd": MISSING, "num_hidden_layers": LAYERS, "n_layer": None}, {}),
        ("qwen2", {"layer_types": ["attention"] * LAYERS}, {}),
        ("llama", {"layer_types": ["attention"] * LAYERS}, {}),
        ("qwen3", {"sliding_window": 0}, {}),
        ("smollm3", {"sliding_window": -1, "no_rope_layer_interval": 0}, {}),
        ("llama", {"rope_scaling": {"type": "default", "mrope_section": [2, 1, 1], "alpha": None}}, {}),
        ("gpt2", {"n_ctx": 32}, {}),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 0, 1]}, {}),
        ("gpt_neox", {"hidden_act": "gelu_python"}, {}),
        ("gpt_neox", {"head_dim": 8}, {}),
        ("mistral", {"layer_types": ["sliding_attention"] * LAYERS}, {}),
        (
            "mistral",
            {"num_key_value_heads": MISSING, "num_attention_heads": 8},
            {"num_key_value_heads": 8, "num_attention_heads": 8},
        ),
        ("phi3", {"num_key_value_heads": MISSING}, {"num_key_value_heads": 4}),
        ("bloom", {"n_embed": 32, "hidden_size": MISSING, "num_attention_heads": 4, "n_head": MISSING}, {}),
        ("mistral", {"sliding_window": MISSING}, {"sliding_window": 4096}),
    ],
)
def test_older_configs_mean_the_same(family: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    same(read_architecture(config(family, **old)), read_architecture(config(family, **new)))


def test_activations_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = torch.linspace(-6, 6, 200)
    plain = {
        "silu": torch.nn.functional.silu,
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    for name, ours in ACTIVATIONS.items():
        torch.testing.assert_close(activations[name](x), plain[ours](x), atol=1e-6, rtol=1e-5, msg=name)
