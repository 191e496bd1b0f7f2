"""The reference of ``verify --against`` is loaded by transformers itself, so that it sees faults of our reader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("transformers")

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import gguf_blocks, open_checkpoint
from dynexport.exporter.checkpoint.gguf_layout import GgufFamily
from dynexport.exporter.checkpoint.safetensors_file import SafetensorsFile
from dynexport.exporter.parity import Report, verify
from dynexport.exporter.reference import loading, weights
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

SavedModel = Callable[[str], Path]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Path, path: Path) -> None:
    """A llama as llama.cpp stores it: rows of q and k interleaved, Q4_1 where rows are whole blocks."""
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    for name, values in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            layer, _, inner = module.removeprefix("model.layers.").partition(".")
            stored = f"blk.{layer}.{NAMES[inner]}.weight"
        else:
            stored = f"{NAMES[module]}.weight"
        if module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else kv_heads
            values = values.reshape(count, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values.astype(np.float32))
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(stored, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def verified(model: Path, tmp_path: Path) -> Report:
    """A conversion by our reader, held to the model as transformers loads it."""
    convert(model, tmp_path / "bundle", golden=model.is_dir())
    return verify(Bundle.open(tmp_path / "bundle"), model, prompts=[[3, 14, 15, 92, 65]], new_tokens=1)


def misread(monkeypatch: pytest.MonkeyPatch, change: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Our reader of safetensors gives other values from now on."""
    read = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name: change(name, read(self, name)))


def swapped_halves(name: str, values: np.ndarray) -> np.ndarray:
    return np.roll(values, len(values) // 2, axis=0) if name.endswith("q_proj.weight") else values


def transposed(name: str, values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.T) if name.endswith("self_attn.q_proj.weight") else values


def without_bias(name: str, values: np.ndarray) -> np.ndarray:
    return values * 0 if name.endswith("self_attn.k_proj.bias") else values


def another_head(name: str, values: np.ndarray) -> np.ndarray:
    return values[::-1].copy() if "embed_tokens" in name or name == "lm_head.weight" else values


FAULTS = {
    "none": ("qwen2", lambda name, values: values),
    "transposed q": ("llama", transposed),
    "rows of q in another order": ("llama", swapped_halves),
    "a bias dropped": ("qwen2", without_bias),
    "a tied head misread": ("qwen2", another_head),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_our_reader_fails(
    fault: str, saved_model: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, change = FAULTS[fault]
    model = saved_model(family)
    if family == "qwen2":  # transformers begins with biases of zero
        model = shutil.copytree(model, tmp_path / "model")
        tensors = load_file(model / "model.safetensors")
        generator = np.random.default_rng(5)
        tensors |= {k: generator.standard_normal(v.shape, np.float32) for k, v in tensors.items() if "bias" in k}
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    misread(monkeypatch, change)
    report = verified(model, tmp_path)
    assert report.reference == "transformers (from_pretrained)"
    assert report.passed == (fault == "none")
    # Golden vectors are not computed with our reader either.
    golden = verify(Bundle.open(tmp_path / "bundle"), prompts=[[3, 14, 15, 92, 65]], new_tokens=1)
    assert golden.reference.startswith("safetensors")
    assert golden.passed == (fault == "none")


def nibbles_in_another_order(packed: np.ndarray, span: int) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def test_gguf_files_are_loaded_by_transformers(saved_model: SavedModel, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="the test extra has it")
    path = tmp_path / "tiny.gguf"
    write_gguf(saved_model("llama"), path)
    report = verified(path, tmp_path)
    assert report.reference == "transformers (from_pretrained)"
    assert report.passed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GgufFamily, "to_hugging_face", lambda self, name, values, heads, kv_heads: values)
        assert not verified(path, tmp_path).passed
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gguf_blocks, "_nibbles", nibbles_in_another_order)
        assert not verified(path, tmp_path).passed


def test_without_accelerate_the_report_says_whose_reader_it_is(
    saved_model: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(saved_model("llama"), path)
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    loaded = Weights(open_checkpoint(path), streaming=False).loaded_by
    assert loaded.startswith("dynexport's own reader, whose faults it cannot show (transformers needs accelerate")


def test_a_gguf_file_that_transformers_does_not_know_is_read_by_ours_and_told(
    saved_model: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(checkpoint: Any, *_: Any) -> Any:
        raise DynexportError(f"{checkpoint.source}: transformers cannot load it: not supported yet")

    path = tmp_path / "tiny.gguf"
    write_gguf(saved_model("llama"), path)
    monkeypatch.setattr(weights, "reader_reason", lambda checkpoint: "")
    monkeypatch.setattr(weights, "load_pretrained", refuse)
    loaded = Weights(open_checkpoint(path), streaming=False).loaded_by
    assert loaded.endswith("cannot show (transformers cannot load it: not supported yet)")


def test_a_layer_at_a_time_shares_no_reader_either(
    saved_model: SavedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misread(monkeypatch, lambda name, values: values * 0)
    streaming = Weights(open_checkpoint(saved_model("gpt2")), streaming=True)
    assert streaming.loaded_by == "safetensors, one layer at a time, into transformers' modules"
    assert streaming.model.get_input_embeddings().weight.abs().sum() > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_a_head_that_is_stored_beside_the_embedding_counts(
    streaming: bool, saved_model: SavedModel, tmp_path: Path
) -> None:
    """As transformers unties them, though config.json says that they are one."""
    model = shutil.copytree(saved_model("qwen2"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    loaded = Weights(open_checkpoint(model), streaming=streaming).model
    np.testing.assert_array_equal(loaded.get_output_embeddings().weight, tensors["lm_head.weight"])
    np.testing.assert_array_equal(loaded.get_input_embeddings().weight, tensors["model.embed_tokens.weight"])


def test_a_tensor_that_transformers_leaves_unread_is_named(saved_model: SavedModel, tmp_path: Path) -> None:
    model = shutil.copytree(saved_model("llama"), tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mod_router.weight"] = np.ones((1, 32), np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    Weights(open_checkpoint(model), streaming=False)
    tensors["model.layers.1.some_router.weight"] = np.ones((1, 32), np.float32)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DynexportError, match=r"tensor model\.layers\.1\.some_router\.weight: .* leaves unread"):
        loading.load_pretrained(open_checkpoint(model))
