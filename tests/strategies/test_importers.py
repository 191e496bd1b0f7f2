"""The importers of other routing code: which checkpoints they know, what they make of them, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from methods import (
    DLLM,
    DLO,
    HIDDEN,
    INNER,
    LAYERS,
    DLOExAttn,
    FlexiDepth,
    FlexiDepthQwen3,
    MindSkip,
    SkipGPT,
    Stored,
    write,
)

from dynexport.exporter.bundle.contract import read_contract
from dynexport.exporter.checkpoint import Checkpoint
from dynexport.exporter.families import read_architecture
from dynexport.exporter.strategies.importing import importers, open_imported
from dynexport.runtime.bundle.errors import DynexportError

# Layout -> the importer that must know it, and the checkpoint as the method saves it.
LAYOUTS: dict[str, tuple[str, Callable[[], Stored]]] = {
    "flexidepth": ("flexidepth", FlexiDepth.stored),
    "flexidepth-qwen3": ("flexidepth", FlexiDepthQwen3.stored),
    "skipgpt": ("skipgpt", SkipGPT.stored),
    "skipgpt-wrapped": ("skipgpt", lambda: SkipGPT.stored(two_layers=True, blocks=True)),
    "skipgpt-second-stage": ("skipgpt", lambda: SkipGPT.stored(prefix="base_model.model.")),
    "d-llm": ("d-llm", DLLM.stored),
    "mindskip": ("mindskip", MindSkip.stored),
    "mindskip-mistral": ("mindskip", lambda: MindSkip.stored(family="mistral")),
    "mindskip-qwen2": ("mindskip", lambda: MindSkip.stored(family="qwen2")),
    "mindskip-plain": ("mindskip", lambda: MindSkip.stored(field="is_mod", plain=True)),
    "dlo": ("dlo", DLO.stored),
    "dlo-exattn": ("dlo", DLOExAttn.stored),
}
TOKEN_ROUTER = {"rule": "router", "threshold": 0.5}
CONTRACTS: dict[str, dict[str, Any]] = {
    "flexidepth": {
        "routed_layers": (1, 3),
        "target": "block",
        "skipped_kv": "own",
        "router_input": "normed",
        "skip_branch": "adapter",
        "gate": "split",
        "router": {"kind": "bottleneck", "activation": "silu", "epsilon": None},
        "decision": {**TOKEN_ROUTER, "comparison": ">"},
    },
    "flexidepth-qwen3": {"gate": "none", "skip_branch": "adapter", "skipped_kv": "own"},
    "skipgpt": {
        "routed_layers": tuple(range(LAYERS)),
        "target": "attention+mlp",
        "skipped_kv": "own",
        "router_input": "hidden",
        "gate": "none",
        "router": {"kind": "pair", "activation": "silu", "epsilon": None},
        "decision": {**TOKEN_ROUTER, "comparison": ">="},
    },
    "skipgpt-wrapped": {"router": {"kind": "mlp", "activation": "relu", "epsilon": None}},
    "d-llm": {
        "routed_layers": (2, 3),
        "target": "block",
        "skipped_kv": "none",
        "router_input": "hidden",
        "gate": "none",
        "keep_first": 2,
        "router": {"kind": "mlp", "activation": "silu", "epsilon": None},
        "decision": {**TOKEN_ROUTER, "comparison": ">="},
    },
    "mindskip": {
        "routed_layers": (1, 2, 3),
        "target": "attention",
        "skipped_kv": "none",
        "level": "sequence",
        "router_input": "normed",
        "gate": "none",
        "router": {"kind": "linear", "activation": "silu", "epsilon": None},
        "decision": {**TOKEN_ROUTER, "comparison": ">="},
    },
    "dlo": {
        "routed_layers": (1, 2),
        "target": "block",
        "skipped_kv": "none",
        "router_input": "hidden",
        "gate": "affine",
        "affine": (0.75, 0.5),
        "decision": {**TOKEN_ROUTER, "comparison": ">"},
    },
    "dlo-exattn": {"target": "mlp", "gate": "affine"},
}
FAMILIES = {"flexidepth-qwen3": "qwen3", "mindskip-mistral": "mistral", "mindskip-qwen2": "qwen2"}


def error_of(action: Callable[[], object]) -> str:
    """The message of the DynexportError, which must be one line."""
    with pytest.raises(DynexportError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def read(directory: Path, stored: Stored) -> Checkpoint:
    return open_imported(write(directory, stored))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_is_known_by_config_and_tensors(layout: str, tmp_path: Path) -> None:
    name, stored = LAYOUTS[layout]
    checkpoint = read(tmp_path, stored())
    assert checkpoint.importer == name
    assert "no trained checkpoint was at hand" in checkpoint.notes[0]
    architecture = read_architecture(checkpoint.config)
    assert (architecture.family, architecture.layers) == (FAMILIES.get(layout, "llama"), LAYERS)
    for tensor in checkpoint.names:
        assert checkpoint.read(tensor).shape == checkpoint.shape(tensor), tensor


@pytest.mark.parametrize("layout", CONTRACTS)
def test_its_contract(layout: str, tmp_path: Path) -> None:
    contract = read_contract(read(tmp_path, LAYOUTS[layout][1]())).model_dump()
    assert {field: contract[field] for field in CONTRACTS[layout]} == CONTRACTS[layout]


def test_every_importer_has_a_layout_here_or_is_tested_elsewhere() -> None:
    assert {name for name, _ in LAYOUTS.values()} == importers().keys() - {"astramind", "diffskip"}


def test_two_products_without_anything_between_become_one(tmp_path: Path) -> None:
    stored = FlexiDepth.stored()
    name, checkpoint = "model.layers.1.router.router_", read(tmp_path, stored)
    product = stored[1][name + "head.weight"] @ stored[1][name + "dec.weight"]
    np.testing.assert_allclose(checkpoint.read("model.layers.1.mod_router.fc2.weight"), product, atol=1e-6)


# What is wrong -> layout, changes of the config (None removes), changes of tensors (shape, None removes), the message.
FAULTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "missing router": (
        "flexidepth",
        {},
        {"model.layers.3.router.router_dec.weight": None},
        "tensor model.layers.3.router.router_dec.weight: expected shape [32, 8] by config.json, found no such tensor",
    ),
    "missing adapter": ("flexidepth", {}, {"model.layers.1.router_proj.up_proj.weight": None}, "router_proj.up_proj"),
    "wrong shape": (
        "flexidepth",
        {},
        {"model.layers.1.router_proj.down_proj.weight": (HIDDEN, INNER // 6)},
        "model.layers.1.router_proj.down_proj.weight: expected shape [8, 32] by config.json, found [32, 8]",
    ),
    "wrong factor": ("flexidepth", {"router_reduction_factor": 8}, {}, "router_enc.weight: expected shape [4, 32]"),
    "factor 0": ("flexidepth", {"proj_reduction_factor": 0}, {}, "proj_reduction_factor: expected an integer from 1"),
    "routed layer without router": ("flexidepth", {"routing_layers": [1, 2, 3]}, {}, "routing_layers: expected layers"),
    "router without routed layer": ("flexidepth", {"routing_layers": [3]}, {}, "that have a router, [1, 3], found [3]"),
    "misnamed tensor": (
        "flexidepth",
        {},
        {"model.layers.1.router.router_tail.weight": (1, HIDDEN)},
        "tensor model.layers.1.router.router_tail.weight: expected the routers of FlexiDepth",
    ),
    "unknown gate": ("flexidepth-qwen3", {"router_gate_mode": "soft"}, {}, "router_gate_mode: expected released or"),
    "unknown activation": ("flexidepth", {"hidden_act": "gelu"}, {}, "hidden_act: expected silu"),
    "contract of another method": (
        "flexidepth",
        {"dynexport": {"gate": "raw"}},
        {},
        "dynexport.gate: expected 'split'",
    ),
    "missing router of the MLP": (
        "skipgpt",
        {},
        {"model.layers.2.router_mlp.weight_predictor.bias": None},
        "router_mlp.weight_predictor.bias: expected shape [2] by config.json, found no such tensor",
    ),
    "misshapen pair": (
        "skipgpt",
        {},
        {"model.layers.0.router_attention.weight_predictor.weight": (1, HIDDEN)},
        "router_attention.weight_predictor.weight: expected shape [2, 32] by config.json, found [1, 32]",
    ),
    "one router with two layers": (
        "skipgpt",
        {},
        {
            "model.layers.0.router_mlp.hidden_layer.weight": (8, HIDDEN),
            "model.layers.0.router_mlp.hidden_layer.bias": (8,),
        },
        "hidden_layer.weight: expected shape [8, 32] by config.json, found no such tensor",
    ),
    "routers beyond the model": (
        "skipgpt",
        {},
        {"model.layers.4.router_mlp.weight_predictor.bias": (2,)},
        "tensor model.layers.4.router_mlp.weight_predictor.bias: expected the routers of SkipGPT",
    ),
    "both stages": (
        "skipgpt",
        {},
        {"base_model.model.model.layers.0.router_mlp.weight_predictor.bias": (2,)},
        "mixes two checkpoints",
    ),
    "half a LoRA": (
        "d-llm",
        {},
        {"layers.1.attention.lora_q.linear_B.weight": None},
        "layers.1.attention.lora_q.linear_B.weight: expected shape [32, 2] by config.json, found no such tensor",
    ),
    "router width": ("d-llm", {"dynamic_router_hdim": 8}, {}, "router.linear_1.weight: expected shape [8, 32]"),
    "start layer": ("d-llm", {"dynamic_start_layer": 1}, {}, "tensor layers.1.router.linear_1.weight: expected shape"),
    "later start layer": (
        "d-llm",
        {"dynamic_start_layer": 3},
        {},
        "tensor layers.2.router.linear_1.bias: expected the",
    ),
    "no routed layer": ("d-llm", {"dynamic_start_layer": 4}, {}, "dynamic_start_layer: expected a layer below 4"),
    "negative reserve": (
        "d-llm",
        {"dynamic_reserve_initials": -1},
        {},
        "dynamic_reserve_initials: expected an integer",
    ),
    "odd heads": ("d-llm", {"n_heads": 3}, {}, "n_heads: expected heads of an even number of channels"),
    "wrong threshold": ("mindskip", {"threshold": "high"}, {}, "threshold: expected a number, found 'high'"),
    "trained threshold": ("mindskip", {"train_threshold": True}, {}, "train_threshold: expected false"),
    "no granularity": ("mindskip", {"granularity": None}, {}, "granularity: expected attn_sequence, found None"),
    "other granularity": ("mindskip", {"granularity": "mlp_sequence"}, {}, "granularity: expected attn_sequence"),
    "no switches": ("mindskip", {"is_mindskip": None}, {}, "is_mindskip: expected a list of 4 times true or false"),
    "all switches off": ("mindskip", {"is_mindskip": [False] * 4}, {}, "is_mindskip: expected true for a layer"),
    "a switch too many": ("mindskip", {"is_mindskip": [True] * 5}, {}, "is_mindskip: expected a list of 4 times"),
    "switch without router": ("mindskip", {"is_mindskip": [True] * 4}, {}, "model.layers.0.router.weight: expected"),
    "router without switch": (
        "mindskip-plain",
        {"is_mod": [False, True, True, False]},
        {},
        "tensor model.layers.3.router.weight: expected the routers of MindSkip in the layers",
    ),
    "other family": (
        "mindskip",
        {"model_type": "gemma_mindskip"},
        {},
        "model_type: expected llama or mistral or qwen2",
    ),
    "router with bias": (
        "mindskip",
        {},
        {"model.layers.1.router.bias": (1,)},
        "tensor model.layers.1.router.bias: expe",
    ),
    "gap of text": ("dlo", {"scale_gap": "wide"}, {}, "scale_gap: expected a number, found 'wide'"),
    "gap too large": ("dlo", {"scale_gap": 1e30}, {}, "scale_gap: expected a number, found 1e+30"),
    "rescale": ("dlo", {"rescale_hidden_states": 1}, {}, "rescale_hidden_states: expected true or false, found 1"),
    "missing router of a block": (
        "dlo",
        {},
        {"model.routers.2.weight": None},
        "model.routers.2.weight: expected shape",
    ),
    "router of no block": (
        "dlo",
        {"is_dlo": [False, True, False, False]},
        {},
        "tensor model.routers.2.weight: expected",
    ),
    "layers as text": ("dlo", {"num_hidden_layers": "4"}, {}, "num_hidden_layers: expected an integer from 1"),
}


def changed(stored: Stored, fields: dict[str, Any], shapes: dict[str, Any]) -> Stored:
    config, tensors = {**stored[0], **fields}, dict(stored[1])
    for name, shape in shapes.items():
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float32)
    return {name: value for name, value in config.items() if value is not None}, tensors


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    layout, fields, shapes, expected = FAULTS[fault]
    message = error_of(lambda: read(tmp_path, changed(LAYOUTS[layout][1](), fields, shapes)))
    assert expected in message and "found" in message, message
    assert "\\" not in message


@pytest.mark.parametrize("field", ["router_threshold", "dlo_threshold", "is_moe"])
@pytest.mark.parametrize("layout", ["flexidepth", "dlo", "mindskip"])
def test_an_unknown_field_stops_it(layout: str, field: str, tmp_path: Path) -> None:
    checkpoint = read(tmp_path, changed(LAYOUTS[layout][1](), {field: 0.7}, {}))
    assert f"{field}: expected no such field" in error_of(lambda: read_architecture(checkpoint.config))


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "diffskip_llama"},
        {"architectures": ["DiffSkipLlamaForCausalLM"]},
        {"auto_map": {"AutoModelForCausalLM": "modeling_diffskip.Model"}},
    ],
)
def test_diffskip_is_refused_by_name(fields: dict[str, Any], tmp_path: Path) -> None:
    message = error_of(lambda: read(tmp_path, changed(FlexiDepth.stored(), fields, {})))
    assert "import diffskip: expected a method whose formula is public" in message


def test_diffskip_is_refused_by_the_name_of_its_directory(tmp_path: Path) -> None:
    directory = write(tmp_path / "DiffSkip-Llama-3-8B-Instruct", FlexiDepth.stored())
    assert "import diffskip" in error_of(lambda: open_imported(directory))


def test_a_named_importer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    directory = write(tmp_path, DLO.stored())
    assert "model_type: expected ddllama or ddqwen3" in error_of(lambda: open_imported(directory, "flexidepth"))
    for name in importers().keys() - {"dlo"}:
        assert str(directory) in error_of(lambda name=name: open_imported(directory, name))


def test_a_dense_checkpoint_needs_no_importer() -> None:
    checkpoint = open_imported(CONFORMANCE / "dense")
    assert checkpoint.importer is None
    assert checkpoint.config == json.loads((CONFORMANCE / "dense" / "config.json").read_text())
