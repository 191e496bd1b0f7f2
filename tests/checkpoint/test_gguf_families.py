"""GGUF files of families beyond llama: written here by llama.cpp's rules from transformers' models, and read back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from gguf_models import random_blocks
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, VARIANTS, save_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.gguf_file import GgufFile
from dynexport.exporter.families import read_architecture
from dynexport.exporter.parity.verification import verify
from dynexport.runtime.bundle.errors import DynexportError

pytest.importorskip("transformers")

Tensors = dict[str, np.ndarray]
SavedModel = Callable[[str], Path]
_ATTENTION = {
    f"self_attn.{ours}_proj": f"attn_{theirs}" for ours, theirs in zip("qkvo", ("q", "k", "v", "output"), strict=True)
}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_MLP = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_LLAMA = {**_ATTENTION, **_NORMS, **_MLP}
_POST = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
_FUSED = {
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_NEOX = {name.replace("self_attention", "attention"): stored for name, stored in _FUSED.items()}
_QWEN_MOE = {"mlp.gate": "ffn_gate_inp"}
_SHARED = {f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")}
# A model of tests -> its architecture in GGUF files, and the names of a layer's modules.
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "arcee": ("arcee", _LLAMA),
    "bloom": ("bloom", {**_NORMS, **_FUSED}),
    "cohere": ("command-r", _LLAMA),
    "ernie4_5": ("ernie4_5", _LLAMA),
    "exaone4": ("exaone4", {**_ATTENTION, **_MLP, **_HEAD_NORMS, **_POST}),
    "falcon": ("falcon", {**_FUSED, "input_layernorm": "attn_norm"}),
    "falcon-two-norms": ("falcon", {**_FUSED, "ln_attn": "attn_norm_2", "ln_mlp": "attn_norm"}),
    "gpt_neox": ("gptneox", {**_NORMS, **_NEOX}),
    "gpt_oss": (
        "gpt-oss",
        {
            **_ATTENTION,
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "post_attention_norm",
            "mlp.router": "ffn_gate_inp",
        },
    ),
    "granitemoe": ("granitemoe", {**_ATTENTION, **_NORMS, "block_sparse_moe.router.layer": "ffn_gate_inp"}),
    "mixtral": ("llama", {**_ATTENTION, **_NORMS, "block_sparse_moe.gate": "ffn_gate_inp"}),
    "nemotron": ("nemotron", _LLAMA),
    "olmo": ("olmo", _LLAMA),
    "olmoe": ("olmoe", {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_QWEN_MOE}),
    "phi": (
        "phi2",
        {**_ATTENTION, **_NORMS, "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    ),
    "qwen2_moe-all": (
        "qwen2moe",
        {**_ATTENTION, **_NORMS, **_QWEN_MOE, **_SHARED, "mlp.shared_expert_gate": "ffn_gate_inp_shexp"},
    ),
    "qwen3_moe": ("qwen3moe", {**_ATTENTION, **_NORMS, **_HEAD_NORMS, **_QWEN_MOE}),
    "seed_oss": ("seed_oss", {**_LLAMA, "post_attention_layernorm": "post_attention_norm"}),
    "stablelm": ("stablelm", _LLAMA),
    "stablelm-parallel": ("stablelm", _LLAMA),
    "starcoder2": ("starcoder2", {**_ATTENTION, **_NORMS, "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}),
}
_OWN = {
    "falcon-two-norms": {**VARIANTS["falcon-groups"][1], "bias": False},
    "qwen2_moe-all": {**FAMILIES["qwen2_moe"], "mlp_only_layers": []},
}
_OUTER = {
    **dict.fromkeys(("model.embed_tokens", "transformer.word_embeddings", "gpt_neox.embed_in"), "token_embd"),
    **dict.fromkeys(
        ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.final_layernorm"), "output_norm"
    ),
    **dict.fromkeys(("lm_head", "embed_out"), "output"),
    "transformer.word_embeddings_layernorm": "token_embd_norm",
}
_PERMUTED = ("arcee", "granitemoe", "llama", "olmo")
_LAYERS = ("model.layers.", "transformer.h.", "gpt_neox.layers.")
# What files do not hold, or llama.cpp ignores: windows of starcoder2 and mixtral, and falcon's length, always 2048.
_LOST = {"starcoder2": {"windows"}, "mixtral": {"windows"}, "phi": {"intermediate_size"}, "bloom": {"max_length"}}
# The limit of gpt-oss's experts is a constant of llama.cpp, the one of the published models.
_CONSTANT = {"gpt_oss": {"swiglu_limit": 7.0}, "falcon": {"num_kv_heads": 1}}
_NAMES_OF_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "n_layer": "block_count",
    "num_attention_heads": "attention.head_count",
    "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_kv_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_experts": "expert_count",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "sliding_window": "attention.sliding_window",
}
_NAMES_OF_NUMBERS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    **dict.fromkeys(
        ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"), "attention.layer_norm_epsilon"
    ),
    "logit_scale": "logit_scale",
    "logits_scaling": "logit_scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
}


def permuted(values: np.ndarray, heads: int) -> np.ndarray:
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def ungrouped(values: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Rows of groups of queries, a key and a value -> all queries, all keys, all values."""
    groups = values.reshape(kv_heads, heads // kv_heads + 2, -1, *values.shape[1:])
    return np.concatenate(
        [part.reshape(-1, *values.shape[1:]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])]
    )


def experts_of(tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """The stored tensors of experts, which are taken out of ``tensors``."""
    kinds = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
    single: dict[str, dict[int, np.ndarray]] = {}
    for name in [name for name in tensors if ".experts." in name or "_linear.weight" in name or ".sinks" in name]:
        value, layer, last = tensors.pop(name), name.split(".")[2], name.split(".")[-1]
        stored = f"blk.{layer}.ffn_{{}}_exps.{{}}"
        if name.endswith("sinks"):
            yield f"blk.{layer}.attn_sinks.weight", value
        elif "input_linear" in name:
            for part, half in zip(("gate", "up"), np.split(value, 2, axis=1), strict=True):
                yield stored.format(part, "weight"), half
        elif "output_linear" in name:
            yield stored.format("down", "weight"), value
        elif last in ("gate_up_proj", "down_proj"):
            value = value.swapaxes(1, 2)
            parts = {"down": value} if last == "down_proj" else {"gate": value[:, ::2], "up": value[:, 1::2]}
            yield from ((stored.format(part, "weight"), each) for part, each in parts.items())
        elif last.endswith("_bias"):
            parts = {"down": value} if last == "down_proj_bias" else {"gate": value[:, ::2], "up": value[:, 1::2]}
            yield from ((stored.format(part, "bias"), each) for part, each in parts.items())
        else:
            part = kinds[name.split(".")[-2]]
            single.setdefault(stored.format(part, "weight"), {})[int(name.split(".")[-3])] = value
    for name, values in single.items():
        yield name, np.stack([values[i] for i in range(len(values))])


def as_stored(architecture: str, modules: dict[str, str], tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """The tensors of a file, by llama.cpp's rules."""
    tensors = dict(tensors)
    heads = config.get("num_attention_heads") or config["n_head"]
    kv_heads = config.get("num_key_value_heads") or config.get("num_kv_heads") or heads
    stored = dict(experts_of(tensors))
    for name, value in tensors.items():
        module, kind = name.rsplit(".", 1)
        if prefix := next((prefix for prefix in _LAYERS if module.startswith(prefix)), ""):
            layer, inner = module.removeprefix(prefix).split(".", 1)
            target = f"blk.{layer}.{modules[inner]}.{kind}"
        else:
            target = f"{_OUTER[module]}.{kind}"
        if architecture in _PERMUTED and ".q_proj" in name:
            value = permuted(value, heads)
        if architecture in _PERMUTED and ".k_proj" in name:
            value = permuted(value, kv_heads)
        if "query_key_value" in name:
            value = ungrouped(value, heads, kv_heads)
        if architecture == "nemotron" and name.endswith("norm.weight"):
            value = value + 1
        stored[target] = np.squeeze(value) if "shexp" in target and value.shape[0] == 1 else value
    return stored


def write(path: Path, name: str, model: Path, kind: Kind = Kind.F32, experts: Sequence[Kind] = ()) -> Tensors:
    """Write a model as a file whose matrices have a type, and return the values of its tensors.

    With ``experts``, those of every layer are random blocks of a type of their own.
    """
    architecture, modules = CASES[name]
    config = json.loads((model / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    for field, key in _NAMES_OF_SIZES.items():
        if config.get(field) is not None and not (key.endswith("window") and architecture in ("llama", "starcoder2")):
            writer.add_uint32(f"{architecture}.{key}", config[field])
    for field, key in _NAMES_OF_NUMBERS.items():
        if config.get(field) is not None:
            writer.add_float32(f"{architecture}.{key}", config[field])
    if architecture in ("falcon", "bloom"):
        writer.add_feed_forward_length(4 * config["hidden_size"])
    if architecture == "bloom":
        writer.add_context_length(64)
    if architecture == "olmo":
        writer.add_layer_norm_eps(1e-5)
    if architecture in ("stablelm", "gptneox"):
        writer.add_parallel_residual(config["use_parallel_residual"])
    rope = config.get("rope_parameters") or {}
    head_dim = config.get("head_dim") or config["hidden_size"] // (config.get("num_attention_heads") or 1)
    if config.get("head_dim"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "partial_rotary_factor" in rope:
        writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    if rope.get("rope_theta"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if architecture in ("exaone4", "gpt-oss"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    tensors = {}
    for target, value in as_stored(architecture, modules, load_file(model / "model.safetensors"), config).items():
        chosen = kind if value.ndim > 1 and value.shape[-1] % 32 == 0 and "_inp" not in target else Kind.F32
        raw = gguf.quants.quantize(np.ascontiguousarray(value), chosen)
        if experts and "_exps" in target:
            chosen = experts[int(target.split(".")[1])]
            blocks = random_blocks(chosen, value.size // value.shape[-1], value.shape[-1], np.random.default_rng(3))
            raw = blocks.reshape(*value.shape[:-1], -1)
        writer.add_tensor(target, raw, raw_dtype=chosen)
        tensors[target] = gguf.quants.dequantize(raw, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def model_of(saved_model: SavedModel, tmp_path: Path) -> SavedModel:
    def make(name: str) -> Path:
        family = name.split("-")[0]
        if name in _OWN:
            save_model(tmp_path / "model", family, _OWN[name])
        else:
            shutil.copytree(saved_model(name), tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **_CONSTANT.get(name, {})}))
        return tmp_path / "model"

    return make


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_the_model_that_it_was_converted_from(name: str, model_of: SavedModel, tmp_path: Path) -> None:
    model = model_of(name)
    write(tmp_path / "model.gguf", name, model)
    found, expected = open_checkpoint(tmp_path / "model.gguf"), load_file(model / "model.safetensors")
    assert isinstance(found, GgufFile) and set(found.names) == set(expected)
    for tensor, value in expected.items():
        assert found.shape(tensor) == value.shape
        np.testing.assert_allclose(found.read(tensor), value, atol=1e-6, err_msg=tensor)
        if value.ndim == 3:
            np.testing.assert_array_equal(found.read_item(tensor, 1), found.read(tensor)[1], err_msg=tensor)
    ours, theirs = (
        read_architecture(config) for config in (found.config, json.loads((model / "config.json").read_text()))
    )
    for field in {field.name for field in dataclasses.fields(ours)} - {"sources"} - _LOST.get(name, set()):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize(("name", "kind"), [("falcon-two-norms", Kind.Q8_0), ("qwen3_moe", Kind.Q4_0)])
def test_blocks_keep_their_values(name: str, kind: Kind, model_of: SavedModel, tmp_path: Path) -> None:
    """Rows of a fused qkv, and experts; the reference reads the values that the gguf package makes of the blocks."""
    if name == "qwen3_moe":
        _OWN[name] = {**FAMILIES[name], "moe_intermediate_size": 32}
    model = model_of(name)
    _OWN.pop("qwen3_moe", None)
    write(tmp_path / "model.gguf", name, model, kind)
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    save_file({key: checkpoint.read(key) for key in checkpoint.names}, model / "model.safetensors", {"format": "pt"})
    done = convert(tmp_path / "model.gguf", tmp_path / "bundle", strategy="dense", max_length=48)
    assert ("experts are stored in 8 bits" in "".join(done.notes)) == (name == "qwen3_moe")
    assert done.manifest.precision == "gguf" and {each.error for each in done.matrices} == {0}
    report = verify(tmp_path / "bundle", model, threads=1, new_tokens=4)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_experts_keep_their_values_and_convert_says_which_do_not(tmp_path: Path) -> None:
    """The integers of every type are random, Q8_0's -128 among them, which no quantiser writes."""
    kinds = (Kind.IQ4_NL, Kind.MXFP4, Kind.Q8_0, Kind.Q4_1)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", "qwen3_moe", {**FAMILIES["qwen3_moe"], "moe_intermediate_size": 32})
    tensors = write(tmp_path / "model.gguf", "qwen3_moe", tmp_path / "model", Kind.Q4_0, kinds)
    done = convert(tmp_path / "model.gguf", tmp_path / "bundle", strategy="dense", max_length=48, golden=False)
    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "QMoE"]
    for layer, (node, kind) in enumerate(zip(layers, kinds, strict=True)):
        gate_up, down = (in_eight_bits(stored[node.input[at]], stored[node.input[at + 1]]) for at in (2, 5))
        for found, name in ((gate_up[:, 0::2], "gate"), (gate_up[:, 1::2], "up"), (down, "down")):
            values = tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
            assert np.array_equal(found, values) == (kind != Kind.Q4_1), (kind.name, name)
            np.testing.assert_allclose(found, values, atol=0.05 * values.std())
    told = {each.kind: (each.count, each.error) for each in done.matrices if each.stored.endswith("of experts")}
    matrices = 3 * FAMILIES["qwen3_moe"]["num_experts"]
    assert told == {kind.name: (matrices, None if kind == Kind.Q4_1 else 0.0) for kind in kinds}
    assert f"quantised again, to int8: {matrices} Q4_1" in "".join(done.notes)


def in_eight_bits(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values of 8-bit integers [experts, rows, columns] around 128, with a scale for every 32 of a row."""
    blocks = integers.astype(np.float32).reshape(*scales.shape, 32) - 128
    return (blocks * scales[..., None]).reshape(integers.shape)


def test_experts_that_contradict_each_other_are_named(model_of: SavedModel, tmp_path: Path) -> None:
    model, path = model_of("qwen3_moe"), tmp_path / "model.gguf"
    config = json.loads((model / "config.json").read_text())
    for count, found in ((5, "expert_count: expected 6, as its tensors have, found 5"),):
        (model / "config.json").write_text(json.dumps({**config, "num_experts": count, "num_local_experts": None}))
        write(path, "qwen3_moe", model)
        with pytest.raises(DynexportError, match=found):
            open_checkpoint(path)
    tensors = load_file(model / "model.safetensors")
    (model / "config.json").write_text(json.dumps(config))
    gone = {name: value for name, value in tensors.items() if "layers.2.mlp.experts.5." not in name}
    save_file(gone, model / "model.safetensors")
    write(path, "qwen3_moe", model)
    with pytest.raises(
        DynexportError, match=r"blk.2.ffn_(gate|up|down)_exps.weight: expected 6 experts along the first of 3 axes"
    ):
        open_checkpoint(path)
