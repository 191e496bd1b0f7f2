"""Every field of every config class of transformers: honoured, refused by name, or shown to be without effect."""

from __future__ import annotations

import dataclasses
import inspect
from itertools import chain
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES as CONVERTED
from tiny_models import LAYERS, LOOPED, VOCABULARY

from dynexport.exporter.families import asked_fields, find_family, read_architecture
from dynexport.exporter.families.class_defaults import CLASS_DEFAULTS
from dynexport.exporter.families.class_fields import HARMLESS, NEUTRAL
from dynexport.exporter.reference import own_models
from dynexport.runtime.bundle.errors import DynexportError

FAMILIES = CONVERTED | LOOPED
# A default that follows from other fields, and a value that is not it.
CHANGES: dict[str, Any] = {
    "block_configs": [{"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 2.0}}] * LAYERS,
    "early_exit_threshold": 0.5,
    "head_dim": 24,
    "is_causal": False,
    "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
    "n_embed": 48,
    "no_rope_layers": [0] * LAYERS,
    "num_key_value_heads": 1,
    "per_layer_config": {"1": {"intermediate_size": 20}},
    "pruned_heads": {"1": [0]},
    "quantization_config": {"quant_method": "gptq", "bits": 4},
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "sliding_window": 3,
    "test_time_noise": 0.5,
    "transformers_weights": "other.safetensors",
    "use_bidirectional_attention": True,
    "word_embed_proj_dim": 16,
}
# What has an effect only beside others.
BESIDE: dict[tuple[str, str], dict[str, Any]] = {
    ("gemma3_text", "num_hidden_layers"): {"layer_types": None},
    ("falcon", "num_kv_heads"): {"new_decoder_architecture": True},
    ("qwen3_moe", "sliding_window"): {"use_sliding_window": True},
    ("qwen2_moe", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 2},
    ("qwen2_moe", "max_window_layers"): {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ("bloom", "pretraining_tp"): {"slow_but_exact": True},
    ("bloom", "slow_but_exact"): {"pretraining_tp": 2},
    ("qwen2", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 0},
    ("qwen3", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 0},
    ("ouro", "sliding_window"): {"use_sliding_window": True, "max_window_layers": 0},
    ("qwen2", "use_sliding_window"): {"max_window_layers": 0},
    ("qwen3", "use_sliding_window"): {"max_window_layers": 0},
    ("ouro", "use_sliding_window"): {"max_window_layers": 0},
    ("qwen2", "max_window_layers"): {"use_sliding_window": True, "max_window_layers": 1},
    ("qwen3", "max_window_layers"): {"use_sliding_window": True, "max_window_layers": 1},
    ("ouro", "max_window_layers"): {"use_sliding_window": True, "max_window_layers": 1},
    ("smollm3", "sliding_window"): {"use_sliding_window": True, "sliding_window": 5},
    ("smollm3", "use_sliding_window"): {"sliding_window": 5},
    ("smollm3", "num_hidden_layers"): {"no_rope_layers": None},
    ("opt", "hidden_size"): {"word_embed_proj_dim": None},
    ("smollm3", "no_rope_layer_interval"): {"no_rope_layers": None, "no_rope_layer_interval": 2},
}
# Read with the scalings of rotary positions, which have tests of their own.
SCALING = {"original_max_position_embeddings"}
CASES = [
    (family, name)
    for family in FAMILIES
    for name in (*CLASS_DEFAULTS[family], *find_family({"model_type": family}).twins, *NEUTRAL)
    if name not in HARMLESS - asked_fields({"model_type": family, **FAMILIES[family]}).keys() | SCALING
]


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    return "relu" if value != "relu" else "silu"


def outline(config: dict[str, Any]) -> dict[str, Any]:
    """An architecture without its functions."""
    architecture = read_architecture(config)
    return {field.name: getattr(architecture, field.name) for field in dataclasses.fields(architecture)} | {
        "sources": {name: source.names for name, source in architecture.sources.items()}
    }


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_field_is_honoured_or_refused_by_name(family: str, name: str) -> None:
    base = {"model_type": family, **FAMILIES[family], **BESIDE.get((family, name), {})}
    completed = find_family(base).completed(base)
    own = find_family(base).twins.get(name, name)
    value = CHANGES.get(name, changed(completed.get(own, NEUTRAL.get(name, 8))))
    assert value != completed.get(own, MISSING)
    before = outline(base)
    try:
        after = outline({**base, name: value})
    except DynexportError as error:
        assert name in str(error)
    else:
        assert after != before


MISSING = object()


UNKNOWN = ("logit_scale", "residual_multiplier", "num_local_experts", "fusion_config", "quantization")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in FAMILIES
        for name in UNKNOWN
        if name not in CLASS_DEFAULTS[family] and name not in chain(*find_family({"model_type": family}).twins.items())
    ],
)
def test_an_unknown_field_is_refused_unless_it_is_off(family: str, name: str) -> None:
    for off in (None, False, [], {}, ""):
        read_architecture({"model_type": family, **FAMILIES[family], name: off})
    with pytest.raises(DynexportError, match=f"{name}: expected no such field, .* found 0;"):
        read_architecture({"model_type": family, **FAMILIES[family], name: 0})
    with pytest.raises(
        DynexportError, match=rf"\({family}\): {name}: expected no such field, .* found 2; if it does not"
    ):
        read_architecture({"model_type": family, **FAMILIES[family], name: 2})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_that_of_the_installed_transformers(family: str) -> None:
    """A field that a new version adds to a class fails here: it has to be honoured, refused or shown to be harmless."""
    transformers = pytest.importorskip("transformers")
    own_models.register(family)
    found = inspect.signature(type(transformers.AutoConfig.for_model(family))).parameters
    fields = {name: item.default for name, item in found.items() if item.kind is not item.VAR_KEYWORD}
    known = CLASS_DEFAULTS[family]
    # The table is JSON, which has no tuples.
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
    assert {name: fields[name] for name in known.keys() & fields.keys()} == {
        name: known[name] for name in known.keys() & fields.keys()
    }
    assert not fields.keys() - known.keys() - HARMLESS - NEUTRAL.keys()
    assert not known.keys() - fields.keys() - HARMLESS, "transformers has no such field any more"
    twins = type(transformers.AutoConfig.for_model(family)).attribute_map
    assert twins.items() <= find_family({"model_type": family}).twins.items()


# Values that transformers accepts, where a doubled or turned default is none.
ODD: dict[str, Any] = {
    "_attn_implementation": "eager",
    "_attn_implementation_internal": "eager",
    "attn_implementation": "eager",
    "architectures": ["LlamaForSequenceClassification"],
    "auto_map": {"AutoConfig": "configuration.Other"},
    "bad_words_ids": [[3]],
    "cache_implementation": "dynamic",
    "chunk_size_feed_forward": 2,
    "early_stopping": True,
    "max_new_tokens": 5,
    "dtype": "float16",
    "torch_dtype": "float16",
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "problem_type": "regression",
    "dynexport": {"strategy": "dense"},
    "name_or_path": "another",
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "output_attentions": True,
    "output_hidden_states": True,
    "transformers_version": "5.0.0",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_fields_change_nothing_in_pytorch(family: str) -> None:
    """All of them at once, each other than its default."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    own_models.register(family)
    used = asked_fields({"model_type": family, **FAMILIES[family]}).keys()
    others = {
        name: ODD.get(name, changed(CLASS_DEFAULTS[family].get(name, 0.25)))
        for name in sorted(HARMLESS - used - {"model_type", "num_labels", "_num_labels"})
    }
    others |= {name: 3 for name in others if name.endswith("_token_id")} | {"use_cache": False}
    logits = []
    for fields in ({}, others):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(family, **{**FAMILIES[family], **fields})
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
        ids = torch.arange(1, 9)[None] % VOCABULARY
        with torch.no_grad():
            logits.append(model.eval()(ids).logits.numpy())
    # gpt2's reorder_and_upcast_attn takes the same sum in another order, which is 2e-7 in older versions.
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-6)
