"""A Hugging Face directory: what it holds comes out unchanged, and all damage is told in one line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.safetensors_directory import SafetensorsDirectory
from dynexport.runtime.bundle.errors import DynexportError

Tensors = dict[str, np.ndarray]


@pytest.fixture
def tensors() -> Tensors:
    generator = np.random.default_rng(0)
    return {
        "float32": generator.standard_normal((3, 5)).astype(np.float32),
        "float16": generator.standard_normal((4,)).astype(np.float16),
        "bfloat16": generator.standard_normal((2, 3, 4)).astype(ml_dtypes.bfloat16),
        "float64": generator.standard_normal((2, 2)),
        "scalar": np.asarray(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


@pytest.fixture
def directory(tmp_path: Path, tensors: Tensors) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with any header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content)) + content + data)


def write_index(directory: Path, weights: object) -> Path:
    (directory / "model.safetensors").unlink(missing_ok=True)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return index


def error_of(action: Callable[[], object]) -> str:
    """The message of the DynexportError, which must be one line."""
    with pytest.raises(DynexportError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def check_tensors(checkpoint: SafetensorsDirectory, tensors: Tensors) -> None:
    assert set(checkpoint.names) == set(tensors)
    for name, expected in tensors.items():
        values = checkpoint.read(name)
        assert values.dtype == np.float32 and values.shape == checkpoint.shape(name) == expected.shape
        assert values.flags.writeable
        np.testing.assert_array_equal(values, expected.astype(np.float32))


def test_every_dtype_becomes_float32(directory: Path, tensors: Tensors) -> None:
    check_tensors(SafetensorsDirectory(directory), tensors)


def test_open_checkpoint_opens_a_directory(directory: Path) -> None:
    checkpoint = open_checkpoint(str(directory))
    assert isinstance(checkpoint, SafetensorsDirectory)
    assert checkpoint.source == str(directory)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.files == {}


def test_shards(directory: Path, tensors: Tensors) -> None:
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:2]}, directory / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[2:]}, directory / "model-00002-of-00002.safetensors")
    write_index(directory, {name: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, name in enumerate(names)})
    check_tensors(SafetensorsDirectory(directory), tensors)


def test_snapshot_of_a_hub_cache_is_made_of_links(tmp_path: Path, directory: Path, tensors: Tensors) -> None:
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for name in ("config.json", "model.safetensors"):
        blob = repository / "blobs" / name.replace(".", "")
        (directory / name).rename(blob)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    check_tensors(SafetensorsDirectory(snapshot), tensors)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "owner/base"}


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_is_told_by_name(directory: Path, whole: bool) -> None:
    (directory / "adapter_config.json").write_text(json.dumps(ADAPTER))
    if not whole:
        (directory / "config.json").unlink()
        (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    message = error_of(lambda: open_checkpoint(directory))
    assert (
        "found an adapter ('LORA', adapter_config.json) of 'owner/base'; convert that model with --adapter" in message
    )


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.default.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "model.layers.0.mlp.down_proj.ia3_l",
        "lm_head.modules_to_save.default.weight",
        "lora_A.weight",
    ],
)
def test_an_adapter_that_is_not_merged_is_told_by_name(directory: Path, tensors: Tensors, name: str) -> None:
    save_file({**tensors, name: np.zeros((2, 2), np.float32)}, directory / "model.safetensors")
    message = error_of(lambda: open_checkpoint(directory))
    assert f"tensor {name}: " in message and "an adapter that is not merged; merge it with peft" in message


@pytest.mark.parametrize(
    ("field", "value", "method"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "awq"}, "awq"),
        ("quantization_config", {"quant_method": "fp8"}, "fp8"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization_config", {"load_in_4bit": True}, "bitsandbytes"),
        ("quantization_config", {"load_in_8bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("quantization_config", {}, "a method without a name"),
        ("quantization_config", "int4", "a method without a name"),
        ("compression_config", {"format": "pack-quantized"}, "compressed-tensors"),
        ("quantization", {"group_size": 64, "bits": 4}, "mlx"),
    ],
)
def test_a_quantised_checkpoint_is_told_by_its_method(directory: Path, field: str, value: Any, method: str) -> None:
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", field: value}))
    message = error_of(lambda: open_checkpoint(directory))
    assert f"quantised with {method} ({field} of config.json); convert the model that it was made from" in message


@pytest.mark.parametrize(
    ("last", "method"),
    [
        ("qweight", "gptq or awq"),
        ("g_idx", "gptq or awq"),
        ("weight_packed", "compressed-tensors or fp8"),
        ("weight_scale_inv", "compressed-tensors or fp8"),
        ("weight.absmax", "bitsandbytes"),
        ("weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("SCB", "bitsandbytes"),
        ("weight._data", "hqq, aqlm or quanto"),
    ],
)
def test_quantised_weights_are_told_where_the_config_is_silent(
    directory: Path, tensors: Tensors, last: str, method: str
) -> None:
    name = f"model.layers.0.self_attn.q_proj.{last}"
    save_file({**tensors, name: np.zeros((2, 2), np.float32)}, directory / "model.safetensors")
    assert f"quantised with {method} (tensor {name})" in error_of(lambda: open_checkpoint(directory))


def test_carried_files(directory: Path) -> None:
    contents = {"generation_config.json": b"{}", "chat_template.jinja": b"{{ messages }}"}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    (directory / "README.md").write_text("left out")
    assert SafetensorsDirectory(directory).files == contents


@pytest.mark.parametrize(
    ("setting", "template"),
    [
        ("{{ a }}", b"{{ a }}"),
        ([{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}], b"c"),
        ([{"name": "tool_use", "template": "b"}], None),
        (None, None),
    ],
)
def test_chat_template_in_tokenizer_config(directory: Path, setting: Any, template: bytes | None) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": setting}))
    assert SafetensorsDirectory(directory).files.get("chat_template.jinja") == template


def test_tokenizer_override(directory: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    other = tmp_path / "other"
    other.mkdir()
    Tokenizer(BPE({"a": 0}, [])).save(str(other / "tokenizer.json"))
    (other / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    expected = (other / "tokenizer.json").read_bytes()
    assert open_checkpoint(directory, tokenizer=other / "tokenizer.json").files["tokenizer.json"] == expected
    whole = open_checkpoint(directory, tokenizer=other)
    assert Tokenizer.from_buffer(whole.files["tokenizer.json"]).encode("a<end>").ids == [0, 1]
    assert whole.turn_ends == {1: "<end>"}
    (directory / "tokenizer.json").write_bytes(b"damaged, but not asked for")
    assert open_checkpoint(directory, tokenizer=other).files == whole.files
    assert "none: expected a tokenizer, found none; name a" in error_of(
        lambda: open_checkpoint(directory, tokenizer=tmp_path / "none")
    )
    message = error_of(lambda: open_checkpoint(directory, tokenizer=directory / "config.json"))
    assert "config.json" in message and "tokenizer.json" in message


def test_unknown_tensor(directory: Path) -> None:
    checkpoint = SafetensorsDirectory(directory)
    assert "no tensor lm_head.weight" in error_of(lambda: checkpoint.read("lm_head.weight"))
    assert "no tensor lm_head.weight" in error_of(lambda: checkpoint.shape("lm_head.weight"))


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "expected config.json" in error_of(lambda: open_checkpoint(directory))
    (directory / "model.gguf").touch()
    assert "name the .gguf file itself" in error_of(lambda: open_checkpoint(directory))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_invalid_json(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    message = error_of(lambda: open_checkpoint(directory))
    assert name in message and "expected" in message and "found" in message


def test_pickles_are_refused(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    message = error_of(lambda: open_checkpoint(directory))
    assert "pickles can run code" in message and "re-save" in message


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "found neither" in error_of(lambda: open_checkpoint(directory))


def test_truncated_at_every_length(directory: Path) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    for length in {*range(0, len(content), 37), 7, 8, len(content) - 1}:
        path.write_bytes(content[:length])
        message = error_of(lambda: open_checkpoint(directory))
        assert "model.safetensors" in message and f"found {length} bytes" in message


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": {**ENTRY, "shape": [2]}},
        {"a": {**ENTRY, "shape": [-1]}},
        {"a": {**ENTRY, "shape": [1 << 40, 1 << 40]}},
        {"a": {**ENTRY, "data_offsets": [4, 8]}},
        {"a": {**ENTRY, "data_offsets": [4, 0]}},
        {"a": {**ENTRY, "dtype": "F33"}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {}},
        {"a\n": ENTRY},
        [1],
        b"",
        b"{",
        b"\xff",
        b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2),
    ],
)
def test_bad_header(directory: Path, header: object) -> None:
    write_raw(directory / "model.safetensors", header, bytes(4))
    assert "model.safetensors: expected a safetensors file" in error_of(lambda: open_checkpoint(directory))


@pytest.mark.parametrize("length", [1 << 30, 1 << 63])
def test_header_longer_than_the_file(directory: Path, length: int) -> None:
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    assert "model.safetensors" in error_of(lambda: open_checkpoint(directory))


@pytest.mark.parametrize("dtype", ["I32", "U8", "F8_E4M3", "BOOL"])
def test_unsupported_dtype(directory: Path, dtype: str) -> None:
    size = 4 if dtype == "I32" else 1
    write_raw(
        directory / "model.safetensors",
        {"a": {**ENTRY, "dtype": dtype, "data_offsets": [0, size]}},
        bytes(size),
    )
    checkpoint = open_checkpoint(directory)
    message = error_of(lambda: checkpoint.read("a"))
    assert "tensor a" in message and f"found {dtype}" in message and "BF16" in message


def test_file_that_shrinks_after_opening(directory: Path) -> None:
    checkpoint = open_checkpoint(directory)
    os.truncate(directory / "model.safetensors", 100)
    assert "has changed" in error_of(lambda: checkpoint.read("float32"))
    (directory / "model.safetensors").unlink()
    assert "cannot be read" in error_of(lambda: checkpoint.read("float32"))


def test_index_naming_an_absent_shard(directory: Path) -> None:
    write_index(directory, {"a": "model-00001-of-00001.safetensors"})
    message = error_of(lambda: open_checkpoint(directory))
    assert "model.safetensors.index.json" in message and "model-00001-of-00001.safetensors" in message


def test_index_naming_an_absent_tensor(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "shard.safetensors")
    write_index(directory, {"float32": "shard.safetensors", "absent": "shard.safetensors"})
    assert "tensor 'absent': expected in shard.safetensors" in error_of(lambda: open_checkpoint(directory))


def test_a_tensor_that_the_index_leaves_out_is_there(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "shard.safetensors")
    write_index(directory, {"float32": "shard.safetensors"})
    check_tensors(SafetensorsDirectory(directory), tensors)


def test_weights_in_a_file_that_nothing_names(directory: Path, tensors: Tensors) -> None:
    save_file({"float32": tensors["float32"]}, directory / "stale.safetensors")
    save_file({"another": tensors["float32"]}, directory / "consolidated.safetensors")
    check_tensors(SafetensorsDirectory(directory), tensors)
    save_file({"router.weight": tensors["float32"]}, directory / "routers.safetensors")
    message = error_of(lambda: open_checkpoint(directory))
    assert "routers.safetensors: tensor router.weight: expected all weights of the model in its own files" in message


def test_a_tensor_in_two_shards(directory: Path, tensors: Tensors) -> None:
    save_file(tensors, directory / "a.safetensors")
    save_file({"float32": tensors["float32"] + 1}, directory / "b.safetensors")
    write_index(directory, dict.fromkeys(tensors, "a.safetensors") | {"other": "b.safetensors"})
    message = error_of(lambda: open_checkpoint(directory))
    assert "tensor 'float32': expected in 'a.safetensors' alone, found in b.safetensors too" in message


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "model.bin",
        None,
        3,
    ],
)
def test_index_pointing_elsewhere(directory: Path, shard: object) -> None:
    write_index(directory, {"a": shard})
    assert "expected plain names" in error_of(lambda: open_checkpoint(directory))


@pytest.mark.parametrize("shard", ["x" * 5000 + ".safetensors", "a\0.safetensors"])
def test_index_with_impossible_names(directory: Path, shard: str) -> None:
    write_index(directory, {"a": shard})
    error_of(lambda: open_checkpoint(directory))


@pytest.mark.parametrize("weights", [None, [], {}, "a"])
def test_index_without_a_map(directory: Path, weights: object) -> None:
    write_index(directory, weights)
    assert "weight_map" in error_of(lambda: open_checkpoint(directory))


def test_a_directory_of_links_to_files_elsewhere(
    directory: Path, tensors: Tensors, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As people make them to save disk."""
    linked = tmp_path_factory.mktemp("linked")
    for file in directory.iterdir():
        (linked / file.name).symlink_to(file)
    check_tensors(SafetensorsDirectory(linked), tensors)
