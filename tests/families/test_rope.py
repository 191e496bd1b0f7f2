"""Rotary positions against transformers' own: every rope type and spelling, in every family that rotates."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES

from dynexport.exporter.families import read_architecture
from dynexport.exporter.families.architecture import Rotary
from dynexport.runtime.bundle.errors import DynexportError

transformers = pytest.importorskip("transformers")

ROTARY = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "gpt_neox")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
# Of 16 channels that are rotated: two sets of 8.
SHORT, LONG = [1.0 + i / 10 for i in range(8)], [1.0 + i for i in range(8)]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "llama3 without original": LLAMA3,
    "yarn": YARN,
    "yarn without original": {"rope_type": "yarn", "factor": 4.0},
    "yarn, factor of the lengths": {**YARN, "factor": None},
    "yarn, factor below 1": {**YARN, "factor": 0.5},
    "yarn, attention factor": {**YARN, "attention_factor": 0.7},
    "yarn, mscale": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.5},
    "yarn, one mscale": {**YARN, "mscale": 0.8},
    "yarn, no mscale_all_dim": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.0},
    "yarn, betas": {**YARN, "beta_fast": 4, "beta_slow": 0.5},
    "yarn, no betas": {**YARN, "beta_fast": None, "beta_slow": 0},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, truncate null": {**YARN, "truncate": None, "beta_fast": 3.3},
    "yarn, steep": {**YARN, "beta_fast": 1.1, "truncate": False},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 16},
    "longrope without original": LONGROPE,
    "longrope, factor": {**LONGROPE, "original_max_position_embeddings": 16, "factor": 8.0},
    "longrope, factor below 1": {**LONGROPE, "original_max_position_embeddings": 16, "factor": 0.5},
    "longrope, attention factor": {**LONGROPE, "original_max_position_embeddings": 16, "attention_factor": 1.3},
}


def small(family: str, **fields: Any) -> dict[str, Any]:
    """One layer of a family, 16 channels a head, all of them rotated."""
    sizes = {"num_hidden_layers": 1, "head_dim": 16, "layer_types": None, "no_rope_layers": [1]}
    if family == "gpt_neox":
        sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "rotary_pct": 1.0}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    names = {**FAMILIES[family], **sizes, **tokens, "rope_parameters": None, **fields}
    if family != "smollm3":
        names.pop("no_rope_layers", None)
    return {name: value for name, value in names.items() if value is not None}


def of_transformers(family: str, fields: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, float]:
    """Inverse frequencies at the start and after a text of the whole context, and the factor of cos and sin."""
    import torch

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(family, **copy.deepcopy(fields))
    )
    (rotary,) = (module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    first = rotary.inv_freq.numpy().copy()
    rotary(torch.zeros(1, 1, 8), torch.tensor([[model.config.max_position_embeddings - 1]]))
    return first, rotary.inv_freq.numpy(), rotary.attention_scaling


def check(family: str, fields: dict[str, Any]) -> None:
    architecture = read_architecture({"model_type": family, **fields})
    found = architecture.positions
    assert isinstance(found, Rotary)
    first, last, factor = of_transformers(family, fields)
    assert found.dim == 2 * len(first)
    np.testing.assert_allclose(found.inverse_frequencies, first, rtol=3e-6)
    assert found.attention_factor == pytest.approx(factor, rel=1e-12)
    longest = architecture.with_context(architecture.longest).positions
    assert isinstance(longest, Rotary)
    np.testing.assert_allclose(longest.inverse_frequencies, last, rtol=3e-6)
    assert longest.attention_factor == found.attention_factor
    assert architecture.longest == fields["max_position_embeddings"]


@pytest.mark.parametrize("family", ROTARY)
def test_every_rope_type_of_every_family(family: str) -> None:
    for number, scaling in enumerate(SCALINGS.values()):
        theta = (1e4, 5e5)[number % 2]
        check(family, small(family, rope_parameters={"rope_theta": theta, **scaling}))


# Fields, and what they say of: theta, type.
SPELLINGS: list[dict[str, Any]] = [
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 300.0}},
    {"rope_theta": 5e5, "rope_scaling": {}},
    {"rope_theta": 5e5, "rope_parameters": {}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e6}},
    {"rope_parameters": {"factor": 4.0, "type": "linear"}},
    {"rope_theta": 10000, "rope_parameters": {**LLAMA3}, "original_max_position_embeddings": 16},
    {"rope_parameters": {**YARN}, "original_max_position_embeddings": 32},
    {"rope_scaling": {**YARN, "type": "yarn"}, "original_max_position_embeddings": 32},
    {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 8}, "original_max_position_embeddings": 16},
    {"rope_scaling": {**YARN, "finetuned": True}},
    {},
]


@pytest.mark.parametrize("family", [family for family in ROTARY if family != "gpt_neox"])
def test_every_spelling(family: str) -> None:
    for fields in SPELLINGS:
        check(family, small(family, **fields))


def known_to_transformers(family: str, fields: dict[str, Any]) -> bool:
    """Whether this version reads a share within ``rope_parameters``; early versions 5 overwrite it."""
    name = "rope_scaling" if "rope_scaling" in fields else "rope_parameters"
    share = fields.get(name, {}).get("partial_rotary_factor")
    config = transformers.AutoConfig.for_model(family, rope_parameters={"partial_rotary_factor": 0.75})
    return share is None or config.rope_parameters["partial_rotary_factor"] == 0.75


PHI3: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": 16},
    {"rope_scaling": {**LONGROPE, "rope_type": "su", "original_max_position_embeddings": 16}},
    {"rope_scaling": {**LONGROPE, "rope_type": "yarn"}, "original_max_position_embeddings": 16},
    # The class's own original length, 4096, counts more than one within.
    {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}},
    {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 16}, "max_position_embeddings": 8192},
    {
        "rope_scaling": {**LONGROPE, "short_factor": SHORT[:4], "long_factor": LONG[:4]},
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 16,
        "hidden_size": 64,
    },
    {"partial_rotary_factor": 0.5, "rope_theta": 300.0},
    {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
    # 0.3 of 16 channels are 4; 0.35 are 5, which rotate as 6.
    {"partial_rotary_factor": 0.3},
    {"partial_rotary_factor": 0.35},
]


def test_phi3() -> None:
    for fields in PHI3:
        if known_to_transformers("phi3", fields):
            check("phi3", small("phi3", **{"hidden_size": 64, **fields}))


NEOX: list[dict[str, Any]] = [
    {"rotary_pct": 0.5, "rotary_emb_base": 1000},
    {"rotary_pct": None, "rotary_emb_base": 1000},
    {
        "rotary_pct": 0.5,
        "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 300.0},
        "rotary_emb_base": 1e3,
    },
    {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 4.0}, "rotary_emb_base": 1000},
    {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rope_theta": 1000, "rotary_emb_base": 1000},
    # 12 channels, a quarter of them: 3, which rotate as 4.
    {"rotary_pct": None, "hidden_size": 36, "num_attention_heads": 3},
    {"rotary_pct": 0.1, "hidden_size": 36, "num_attention_heads": 3},
]


def test_gpt_neox() -> None:
    for fields in NEOX:
        if known_to_transformers("gpt_neox", fields):
            check("gpt_neox", small("gpt_neox", **fields))


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, ("rope_type", "longrope", "proportional")),
        ("llama", {"rope_parameters": {"rope_type": None}}, ("rope_type", "None")),
        ("llama", {"rope_scaling": {"type": "su", **LONGROPE, "rope_type": "su"}}, ("rope_type", "su")),
        ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, ("rope_scaling.type", "mrope")),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling.type", "linear")),
        ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("full_attention", "all layers")),
        ("llama", {"rope_parameters": {"rope_theta": None}}, ("rope_parameters.rope_theta", "None")),
        ("llama", {"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor", "None")),
        ("llama", {"rope_scaling": {**LONGROPE, "long_factor": LONG[:7]}}, ("long_factor", "8 numbers")),
        ("llama", {"rope_scaling": {**LONGROPE, "short_factor": [*SHORT[:7], 0]}}, ("short_factor[7]", "found 0")),
        ("llama", {"rope_scaling": {**LONGROPE, "original_max_position_embeddings": 1}}, ("from 2",)),
        ("llama", {"rope_scaling": {**YARN, "truncate": "no"}}, ("truncate", "true or false")),
        ("llama", {"rope_scaling": {**YARN, "attention_factor": 0}}, ("attention_factor", "found 0")),
        ("llama", {"rope_scaling": {**YARN, "rope_theta": 1}}, ("rope_theta", "more than 1")),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, ("partial",)),
        ("phi3", {"rope_parameters": {"partial_rotary_factor": 1.5}}, ("partial_rotary_factor", "found 1.5")),
        ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, ("high_freq_factor", "more than low_freq")),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, ("rope_scaling.low_freq_factor", "a number")),
        ("llama", {"rope_scaling": {**LLAMA3, "factor": math.nan}}, ("rope_scaling.factor", "nan")),
        ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": "8"}, ("original_max", "'8'")),
        ("llama", {"head_dim": 5}, ("partial_rotary_factor", "5 channels")),
        ("gpt_neox", {"rotary_pct": 0.5, "partial_rotary_factor": 0.25}, ("partial_rotary_factor", "rotary_pct")),
        ("gpt_neox", {"rope_theta": 5e5}, ("rope_theta", "rotary_emb_base")),
    ],
)
def test_what_transformers_cannot_compute_or_ignores_is_refused(
    family: str, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(DynexportError) as caught:
        read_architecture({"model_type": family, **small(family, **fields), **fields})
    assert all(word in str(caught.value) for word in words), caught.value
