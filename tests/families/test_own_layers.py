"""Layers with sizes of their own: ``per_layer_config`` and Nemotron-NAS's ``block_configs``."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, LAYERS, VARIANTS, InMemory, random_rows

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.families import read_architecture
from dynexport.exporter.families.architecture import LayerSizes
from dynexport.exporter.parity.verification import verify
from dynexport.plugins.cpu_library import CpuLibrary, find_library
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth, Phase
from dynexport.runtime.execution.batch import Batch
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.cost import prompt_flops, step_bytes

_, CONFIG = VARIANTS["llama-own-layers"]
# heads, key heads, channels of the MLP; 0: absent.
SIZES = ((0, 0, 20), (4, 4, 0), (2, 1, 60), (4, 2, 44))
HIDDEN, HEAD, HEADS, WIDEST = 32, 8, 4, 60


@pytest.fixture(scope="module")
def model(saved_model: Callable[[str], Path]) -> Path:
    return saved_model("llama-own-layers")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("own") / "bundle"
    convert(model, output, strategy="early-exit", fields={"exits": [2]}, golden=False, max_length=48)
    return Bundle.open(output)


@pytest.fixture(scope="module")
def padded(model: Path) -> Any:
    """transformers' own llama with layers alike: what a layer lacks is zeros, and keys of a group are repeated."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    fields = {name: value for name, value in CONFIG.items() if name != "per_layer_config"}
    sizes = {"num_key_value_heads": HEADS, "intermediate_size": WIDEST}
    config = transformers.AutoConfig.for_model("llama", **{**fields, **sizes})
    with torch.no_grad():
        found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in found.parameters():
            parameter.data = torch.zeros_like(parameter)
        for name, value in load_file(model / "model.safetensors").items():
            parameter = found.get_parameter(name)
            if ".k_proj." in name or ".v_proj." in name:
                heads, keys, _ = SIZES[int(name.split(".")[2])]
                value = value.reshape(keys, HEAD, HIDDEN).repeat(heads // keys, axis=0).reshape(-1, HIDDEN)
            part = tuple(slice(0, size) for size in value.shape)
            parameter.data[part] = torch.from_numpy(value)
    return found


def save(checkpoint: InMemory, directory: Path) -> None:
    tensors = {name: np.ascontiguousarray(value) for name, value in checkpoint.tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(checkpoint.config))


def logits_of(padded: Any, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        found: np.ndarray = padded(torch.tensor([tokens])).logits[0].numpy()
    return found


def test_the_sizes_are_those_of_the_config(bundle: Bundle) -> None:
    sizes = read_architecture({"model_type": "llama", **CONFIG}).sizes
    assert [(own.heads, own.kv_heads, own.intermediate_size) for own in sizes] == [*SIZES]
    manifest = bundle.manifest
    assert manifest.model.heads_of_layers == tuple(heads for heads, *_ in SIZES)
    assert [sorted(cache.parts) for cache in manifest.caches] == [[]] + [["key", "value"]] * 3
    assert [cache.parts["key"].shape[1] for cache in manifest.caches[1:]] == [4, 1, 2]


def test_prompt_and_decode_are_those_of_a_padded_llama(bundle: Bundle, padded: Any) -> None:
    """Greedy tokens of two rows, one after a prompt in pieces, at lengths that no graph was built with."""
    rows = random_rows(17, 9)
    run = Executor(bundle, threads=1)
    cache = run.full_cache(2, 48)
    found = np.stack(run.prefill(cache, rows, chunk=6))
    for _ in range(8):
        expected = np.stack([logits_of(padded, row)[-1] for row in rows])
        np.testing.assert_allclose(found[:, 0], expected, atol=1e-4)
        tokens = expected.argmax(axis=-1)
        assert (found[:, 0].argmax(axis=-1) == tokens).all()
        for row, token in zip(rows, tokens, strict=True):
            row.append(int(token))
        found = run.step(cache, tokens, bundle.manifest.full)[:, None]


def test_bytes_and_products_count_what_each_layer_has(bundle: Bundle) -> None:
    manifest, context = bundle.manifest, 7
    entry = [2 * keys * HEAD * 4 for _, keys, _ in SIZES]
    weights = [HIDDEN * HEAD * (heads + keys + keys + heads) + 3 * HIDDEN * width for heads, keys, width in SIZES]
    everything = range(LAYERS)
    grown = step_bytes(manifest, everything, context) - step_bytes(manifest, everything, 0)
    assert grown == context * sum(entry)
    assert step_bytes(manifest, [0], context) == step_bytes(manifest, [0], 0)
    norms = [HIDDEN * 4 * ((heads > 0) + (width > 0)) for heads, _, width in SIZES]
    assert manifest.cost.layers == tuple(4 * count + norm for count, norm in zip(weights, norms, strict=True))
    one, none = (prompt_flops(manifest, np.full((LAYERS, 1), count)) for count in (1, 0))
    assert one - none == 2 * sum(weights) + sum(4 * heads * HEAD for heads, *_ in SIZES)


def test_rows_are_copied_saved_and_cut_where_layers_have_no_cache(bundle: Bundle) -> None:
    (row,) = random_rows(12)
    run, full = Executor(bundle, threads=1), bundle.manifest.full
    cache = run.cache(3, 20)

    def after(target: int, *tokens: int) -> np.ndarray:
        phase: Phase = "decode" if len(tokens) == 1 else "prompt"
        (found,) = run.run(cache, Batch([target], [tokens], phase, full)).logits
        return found

    first, second = cache.acquire(2)
    after(first, *row[:8])
    mark = cache.mark(first)
    after(first, *row[8:])
    saved = cache.save(first, mark.lengths, mark.position)
    expected = after(first, 5)
    cache.copy_prefix(mark, second)
    cache.restore(second, saved)
    np.testing.assert_allclose(after(second, 5), expected, atol=1e-5)
    cache.truncate(first, mark)
    after(first, *row[8:])
    np.testing.assert_allclose(after(first, 5), expected, atol=1e-5)
    cache.move(first, 2)
    assert np.isfinite(after(2, 6)).all()


BAD: tuple[tuple[Any, str], ...] = (
    ([], "per_layer_config: expected an object of layers"),
    ({"4": {}}, "per_layer_config: expected each of the layers 0..3 at most once, found '4'"),
    ({"-1": {}}, "per_layer_config: expected each of the layers 0..3 at most once, found '-1'"),
    ({"1": {}, "01": {}}, "at most once, found '01'"),
    ({"1": 3}, "per_layer_config: layer 1: expected an object of fields, found 3"),
    ({"1": {"intermediate_size": 0}}, "layer 1: intermediate_size: expected an integer from 1"),
    ({"1": {"intermediate_size": None}}, "layer 1: intermediate_size: expected an integer from 1"),
    ({"1": {"num_key_value_heads": 3}}, "layer 1: num_key_value_heads: expected a divisor of 4 heads, found 3"),
    ({"1": {"head_dim": 16}}, "layer 1: head_dim: expected no field but intermediate_size, num_attention_heads"),
    ({"1": {"sliding_window": 4}}, "layer 1: sliding_window: expected no field but"),
    ({"1": {"moe": True}}, "layer 1: moe: expected no field but"),
    ({"1": {"skip": ["mixer"]}}, "layer 1: skip: expected a list of attention or mlp"),
    ({"1": {"skip": "mlp"}}, "layer 1: skip: expected a list of attention or mlp"),
    ({str(i): {"skip": ["attention"]} for i in range(4)}, "expected at least one layer with attention"),
    ({str(i): {"skip": ["mlp"]} for i in range(4)}, "expected at least one layer with mlp"),
)


@pytest.mark.parametrize(("value", "message"), BAD)
def test_a_bad_layer_is_named(value: Any, message: str) -> None:
    with pytest.raises(DynexportError, match=message) as error:
        read_architecture({"model_type": "llama", **CONFIG, "per_layer_config": value})
    assert "\n" not in str(error.value)


def test_a_layers_own_heads_need_a_head_dim() -> None:
    config = {"model_type": "qwen2", **FAMILIES["qwen2"], "per_layer_config": {"2": {"num_attention_heads": 2}}}
    with pytest.raises(DynexportError, match="layer 2: num_attention_heads: expected a head_dim of the model"):
        read_architecture(config)


@pytest.mark.parametrize(
    ("layer", "window", "message"), [("0", 3, "expected no window, as layer_types"), ("3", None, "expected a window")]
)
def test_a_layers_own_window_agrees_with_its_type(layer: str, window: int | None, message: str) -> None:
    _, config = VARIANTS["qwen3-own-layers"]
    with pytest.raises(DynexportError, match=f"layer {layer}: sliding_window: {message}"):
        read_architecture({"model_type": "qwen3", **config, "per_layer_config": {layer: {"sliding_window": window}}})


def test_what_equals_the_model_changes_nothing() -> None:
    config = {"model_type": "llama", **FAMILIES["llama"]}
    same = {"0": {"hidden_act": "silu", "intermediate_size": 44, "skip": []}, "3": {}}
    assert read_architecture({**config, "hidden_act": "silu", "per_layer_config": same}).sizes == ()


def nas(layer: int, part: str, **fields: Any) -> dict[str, Any]:
    config = copy.deepcopy(FAMILIES["nemotron-nas"])
    config["block_configs"][layer][part] = {**config["block_configs"][layer][part], **fields}
    return {"model_type": "nemotron-nas", **config}


def test_the_blocks_of_nemotron_nas() -> None:
    sizes = read_architecture({"model_type": "nemotron-nas", **FAMILIES["nemotron-nas"]}).sizes
    # int(2 * 13 * 32 / 3) is 277, and the next multiple of 256 is 512.
    assert sizes == (LayerSizes(0, 0, 256), LayerSizes(4, 2, 0), LayerSizes(4, 1, 20), LayerSizes(4, 4, 512))


def bad_blocks() -> Iterator[tuple[dict[str, Any], str]]:
    for part, field, value in (
        ("attention", "replace_with_linear", True),
        ("attention", "sparsify", ["a"]),
        ("attention", "window_length", 512),
        ("attention", "num_sink_tokens", 4),
        ("attention", "unknown", 0),
        ("ffn", "replace_with_linear", True),
        ("ffn", "moe", {"num_local_experts": 4}),
    ):
        yield nas(2, part, **{field: value}), f"block_configs: layer 2: {part}: {field}: expected null or false"
    yield nas(2, "attention", n_heads_in_group=3), "layer 2: attention: n_heads_in_group: expected a divisor of 4 heads"
    yield nas(2, "attention", n_heads_in_group=None), "layer 2: attention: n_heads_in_group: expected an integer"
    yield nas(2, "attention", no_op=1), "layer 2: attention: no_op: expected true or false, found 1"
    yield nas(0, "ffn", ffn_mult=1e30), "layer 0: ffn: ffn_mult: expected at most"
    yield nas(0, "ffn", ffn_mult=None), "layer 0: ffn: ffn_mult: expected a number"
    yield nas(0, "ffn", hidden_act="relu"), "layer 0: ffn: hidden_act: expected silu, as in the model, found 'relu'"
    for value in (None, [], "abcd", [{}] * 4, [3] * 4):
        yield {**nas(0, "ffn"), "block_configs": value} if value is not None else {}, ""


@pytest.mark.parametrize(("config", "message"), [case for case in bad_blocks() if case[0]])
def test_a_bad_block_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError, match=message or "block_configs") as error:
        read_architecture(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "fields", "found"),
    [
        ("mod", {"routed_layers": [1, 3]}, "layer 1 with 4 heads, 4 key heads, no MLP"),
        ("radial", {}, "layer 0 with no attention, 20 channels"),
        ("loop", {"loops": 2}, "layer 0 with no attention, 20 channels"),
    ],
)
def test_a_strategy_that_needs_layers_alike_says_so(
    strategy: str, fields: dict[str, Any], found: str, model: Path, tmp_path: Path
) -> None:
    message = f"{strategy}: expected layers of one size with attention and MLP, found {found}"
    with pytest.raises(DynexportError, match=message):
        convert(model, tmp_path / "bundle", strategy=strategy, fields=fields)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("qwen2-own-layers", {"plugins": True, "precision": "int8"}),
        (
            "nemotron-nas",
            {
                "strategy": "unified-skip",
                "keep": (0, 3),
                "precision": "int4",
                "kv_cache_dtype": "int8",
                "kv_cache_text": random_rows(400)[0],
            },
        ),
    ],
    ids=["operators, a layer without parts, yarn", "int4, int8 caches, skipping"],
)
def test_rounded_bundles_are_verified(
    name: str, how: dict[str, Any], saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    if how.get("plugins") and not isinstance(find_library(), CpuLibrary):
        pytest.skip("waits for the library of operators, which make operators builds")
    convert(saved_model(name), tmp_path / "bundle", max_length=48, **{"strategy": "dense", **how})
    report = verify(tmp_path / "bundle", saved_model(name), threads=1, new_tokens=4)
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.parametrize("name", ["llama-own-layers", "nemotron-nas", "openelm"])
def test_any_size_that_is_not_its_tensors_is_told(
    name: str, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """One line that names a tensor of the layer, or the field that no model could have."""
    shutil.copytree(saved_model(name), tmp_path / "model")
    file, random = tmp_path / "model" / "config.json", np.random.default_rng(2)
    kept = json.loads(file.read_text())
    for _ in range(5):
        layer = int(random.integers(LAYERS))
        config, size = copy.deepcopy(kept), int(random.integers(1, 70)) * 4 + 1
        if name == "openelm":
            field = ["qkv_multipliers", "ffn_multipliers"][size % 8 // 4]
            config[field][size % 2] = config[field][size % 2] + 1 + size / 8
        elif name == "nemotron-nas":
            config["block_configs"][layer]["ffn"] = {"intermediate_size": size}
        else:
            config["per_layer_config"][str(layer)] = {"intermediate_size": size}
        file.write_text(json.dumps(config))
        with pytest.raises(DynexportError, match=r"layers\.\d|layer \d|multipliers|num_\w+_heads|per_layer") as error:
            convert(tmp_path / "model", tmp_path / "bundle", strategy="dense", golden=False)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.2.mlp.gate_proj.weight", r"model.layers.2.mlp.gate_proj.weight: expected shape \[60, 32\]"),
        (
            "model.layers.2.self_attn.k_proj.weight",
            r"layers.2.self_attn.q_proj.weight, .*: expected shape \[32, 32\]",
        ),
    ],
)
def test_a_size_that_is_not_its_tensors_is_named(tensor: str, message: str, model: Path, tmp_path: Path) -> None:
    checkpoint = InMemory(model)
    checkpoint.tensors[tensor] = checkpoint.tensors[tensor][:-4]
    save(checkpoint, tmp_path)
    with pytest.raises(DynexportError, match=message):
        convert(tmp_path, tmp_path / "bundle", golden=False)


def test_tensors_of_a_layer_that_is_left_out_are_named(model: Path, tmp_path: Path) -> None:
    checkpoint = InMemory(model)
    name = "model.layers.0.input_layernorm.weight"
    checkpoint.tensors[name] = np.ones(HIDDEN, np.float32)
    save(checkpoint, tmp_path)
    with pytest.raises(DynexportError, match=name):
        convert(tmp_path, tmp_path / "bundle", golden=False)


def test_a_model_with_fewer_layers_is_a_plain_one(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    """What ShortGPT and LayerDrop leave: other layers removed, the rest renumbered."""
    checkpoint = InMemory(saved_model("llama"))
    kept = (0, 1, 3)
    checkpoint.config["num_hidden_layers"] = len(kept)
    layers = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(kept)}
    tensors = {}
    for name, value in checkpoint.tensors.items():
        prefix = ".".join(name.split(".")[:3]) + "." if name.startswith("model.layers.") else ""
        if not prefix or prefix in layers:
            tensors[layers.get(prefix, "") + name.removeprefix(prefix)] = value
    checkpoint.tensors = tensors
    save(checkpoint, tmp_path)
    (row,), logits = random_rows(6), []
    for model, name, fields in (
        (tmp_path, "pruned", {"strategy": "dense"}),
        (saved_model("llama"), "whole", {"strategy": "unified-skip", "keep": kept}),
    ):
        convert(model, tmp_path / name, golden=False, **fields)
        run = Executor(Bundle.open(tmp_path / name), threads=1)
        depth = Depth(name="kept", ratio=None, keep=kept, prompt=kept) if name == "whole" else None
        logits.append(run.prefill(run.full_cache(1, 8), [row], depth=depth)[0])
    np.testing.assert_allclose(*logits, atol=1e-5)
