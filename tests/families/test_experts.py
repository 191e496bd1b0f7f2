"""Mixtures of experts: which weights are read, their blocks, MXFP4, the cost of a step, TensorRT's graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conversation import Conversation, follow
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, LAYERS, random_rows, save_model, save_radial_model, save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import Checkpoint, open_checkpoint
from dynexport.exporter.lowering import block_products, experts, onnxruntime
from dynexport.exporter.parity.verification import verify
from dynexport.exporter.reference import Reference
from dynexport.exporter.reference.dequantised import stored_weights
from dynexport.exporter.reference.weights import Weights
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import File
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.cost import step_bytes

pytest.importorskip("transformers")

TOLERANCE = 1e-4
DECLARED = ((0, 3), (0, 2, 3))
SKIP: dict[str, Any] = {"strategy": "unified-skip", "speedups": (2.0, 1.25), "max_length": 48, "golden": False}
# Rows of whole blocks of 32.
WHOLE = {"intermediate_size": 64, "moe_intermediate_size": 32}


@pytest.fixture(scope="module")
def blocked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gpt-oss whose experts have rows of whole blocks."""
    path = tmp_path_factory.mktemp("gpt_oss") / "model"
    save_model(path, "gpt_oss", {**FAMILIES["gpt_oss"], "intermediate_size": 64})
    return path


@pytest.fixture(scope="module")
def mxfp4(blocked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with random experts in MXFP4, as gpt-oss is shipped."""
    path, random = tmp_path_factory.mktemp("mxfp4"), np.random.default_rng(0)
    tensors = load_file(blocked / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, columns, rows = tensors.pop(name).shape
        shape = (count, rows, columns // 32)
        tensors[f"{name}_blocks"] = random.integers(0, 256, (*shape, 16), np.uint8)
        tensors[f"{name}_scales"] = random.integers(118, 126, shape, np.uint8)
    save_file(tensors, path / "model.safetensors")
    config = json.loads((blocked / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}}))
    return path


def poison(bundle: Path, chosen: list[set[int]]) -> int:
    """Overwrite the weights of all experts but those chosen in a layer with NaN, and return how many there were."""
    poisoned = 0
    graph = onnx.load(bundle / "model.onnx", load_external_data=False).graph
    with (bundle / "model.data").open("r+b") as file:
        for tensor in [tensor for tensor in graph.initializer if ".experts.pool." in tensor.name]:
            where = {entry.key: entry.value for entry in tensor.external_data}
            count, layer = tensor.dims[0], int(tensor.name.split(".")[2])
            size = int(where["length"]) // count
            for expert in {*range(count)} - chosen[layer]:
                file.seek(int(where["offset"]) + expert * size)
                file.write(np.full(size // 4, np.nan, np.float32).tobytes())
                poisoned += 1
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["model.data"] = File.of(bundle / "model.data").model_dump()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return poisoned


def test_weights_of_experts_that_are_not_chosen_are_not_read(
    saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """With NaN in all other experts a prompt of two tokens and a decode step give the same bits."""
    model = saved_model("mixtral")
    convert(model, tmp_path / "bundle", strategy="dense", max_length=48, golden=False)
    weights, chosen = Weights(open_checkpoint(model), streaming=False), [set[int]() for _ in range(LAYERS)]
    for layer, seen in zip(weights.layers, chosen, strict=True):
        layer.mlp.gate.register_forward_hook(lambda _, __, out, seen=seen: seen.update(out[2].unique().tolist()))
    Reference(weights, "the model").logits([[5, 7, 11]])

    def logits() -> np.ndarray:
        run = Executor(Bundle.open(tmp_path / "bundle"), threads=2)
        state = run.full_cache(1, 48)
        prompt = run.prefill(state, [[5, 7]], all_logits=True)[0]
        return np.concatenate([prompt, run.step(state, [11], run.manifest.full)])

    before = logits()
    assert poison(tmp_path / "bundle", chosen) >= 2 * LAYERS
    after = logits()
    assert np.isfinite(before).all()
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_four_bits_with_float_activations(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (block_products, experts, onnxruntime):
        monkeypatch.setattr(module, "ACCURACY_LEVEL", 1)
    whole = {name: size for name, size in WHOLE.items() if family == "qwen2_moe" or name == "intermediate_size"}
    save_model(tmp_path / "model", family, {**FAMILIES[family], **whole})
    manifest = convert(tmp_path / "model", tmp_path / "bundle", precision="int4", **SKIP).manifest
    weights = Weights(open_checkpoint(tmp_path / "model"), streaming=False)
    rounded = weights.rounded(stored_weights(tmp_path / "bundle", manifest))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert not rounded.model.get_parameter(name).equal(weights.model.get_parameter(name))
    talk = Conversation.forced(Reference(rounded, "the bundle"), *DECLARED)
    assert follow(Executor(Bundle.open(tmp_path / "bundle"), threads=1), talk, [0, 1, 2, 3]).max() < TOLERANCE


def test_mxfp4_is_what_transformers_makes_of_it(mxfp4: Path) -> None:
    torch = pytest.importorskip("torch")
    convert_moe_packed_tensors = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    checkpoint, stored = open_checkpoint(mxfp4), load_file(mxfp4 / "model.safetensors")
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        blocks, scales = (torch.tensor(stored[f"{name}_{kind}"]) for kind in ("blocks", "scales"))
        expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        np.testing.assert_array_equal(checkpoint.read(name), expected.numpy())
        assert checkpoint.shape(name) == tuple(expected.shape)


def test_eight_bits_keep_mxfp4(mxfp4: Path, tmp_path: Path) -> None:
    done = convert(mxfp4, tmp_path / "int8", precision="int8", **SKIP)
    assert "MXFP4" in "".join(done.notes)
    weights = Weights(open_checkpoint(mxfp4), streaming=False)
    rounded = weights.rounded(stored_weights(tmp_path / "int8", done.manifest)).model
    for name, own in weights.model.named_parameters():
        if ".experts." in name:
            assert rounded.get_parameter(name).equal(own), name
    assert not rounded.lm_head.weight.equal(weights.model.lm_head.weight)


def test_mxfp4_in_floats(mxfp4: Path, tmp_path: Path) -> None:
    convert(mxfp4, tmp_path / "bundle", precision="fp32", **SKIP)
    talk = Conversation.forced(Reference.from_checkpoint(open_checkpoint(mxfp4)), *DECLARED)
    assert follow(Executor(Bundle.open(tmp_path / "bundle"), threads=1), talk, [0, 3]).max() < TOLERANCE


def test_damaged_mxfp4_is_named(mxfp4: Path, tmp_path: Path) -> None:
    tensors = load_file(mxfp4 / "model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    wrong = {
        "blocks": {**tensors, f"{name}_blocks": tensors[f"{name}_blocks"][..., :8].copy()},
        "found NaN or infinity": {**tensors, f"{name}_scales": np.full_like(tensors[f"{name}_scales"], 255)},
        "no tensor": {key: value for key, value in tensors.items() if key != f"{name}_scales"},
    }
    (tmp_path / "config.json").write_text((mxfp4 / "config.json").read_text())
    for told, changed in wrong.items():
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(DynexportError, match=f"{name}.*{told}|{told}.*{name}"):
            convert(tmp_path, tmp_path / "bundle", **SKIP)


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_tensorrt_runs_all_experts(family: str, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    """By standard operators, and sinks too; run by ONNX Runtime."""
    convert(saved_model(family), tmp_path / "bundle", target="tensorrt", max_batch=8, static=True, **SKIP)
    talk = Conversation.forced(Reference.from_checkpoint(open_checkpoint(saved_model(family))), *DECLARED)
    run = Executor(Bundle.open(tmp_path / "bundle"), threads=1)
    assert follow(run, talk, [0, 1, 2, 3]).max() < TOLERANCE
    with pytest.raises(DynexportError, match="expected fp32, fp16 or bf16 for a mixture of experts"):
        convert(saved_model(family), tmp_path / "other", target="tensorrt", precision="int8", **SKIP)


@pytest.mark.parametrize("how", ["plain", "plugins"])
def test_routed_layers_with_experts(how: str, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    save_routed_model(tmp_path / "model", saved_model("granitemoe"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["dynexport"]["routed_layers"] = [*range(LAYERS)]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "model", tmp_path / "bundle", max_length=48, plugins=how == "plugins")
    report = verify(tmp_path / "bundle", tmp_path / "model", threads=1, new_tokens=4)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_radial_refuses_experts(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = save_radial_model(tmp_path / "model", saved_model("mixtral"))
    with pytest.raises(DynexportError, match="radial: expected a pool of layers without experts, found mixtral"):
        convert(model, tmp_path / "bundle", max_length=48)


@pytest.mark.parametrize(
    ("dtype", "told", "more"), [("int8", "int8", {"kv_cache_text": [7] * 240}), ("fp16", "float16", {"plugins": True})]
)
def test_sinks_refuse_rounded_caches(
    dtype: str, told: str, more: dict[str, Any], saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(DynexportError, match=f"kv_cache_dtype: expected auto .*, found {told}"):
        convert(saved_model("gpt_oss"), tmp_path / "bundle", strategy="dense", kv_cache_dtype=dtype, **more)


def test_a_step_costs_the_experts_that_run(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    """6 experts of 3 * 32 * 44 float32: one row reads 2 of them, many rows all."""
    manifest = convert(saved_model("mixtral"), tmp_path / "bundle", strategy="dense", golden=False).manifest
    cost, expert = manifest.cost, 3 * 32 * 44 * 4
    assert (cost.experts, cost.experts_per_token, cost.expert) == (6, 2, (expert,) * LAYERS)
    one, two, many = (step_bytes(manifest, range(LAYERS), 0, rows) for rows in (1, 2, 100))
    assert one == cost.shared + sum(cost.layers)
    assert two - one == round(expert * (6 * (1 - (2 / 3) ** 2) - 2)) * LAYERS
    assert many - one == pytest.approx(4 * expert * LAYERS, rel=1e-6)
    # Attention 64 * 32 + 32 * 32, and the experts: the weights of one layer, twice.
    assert cost.layer_flops == 2 * (64 * 32 + 32 * 32 + 6 * 32 + 2 * 3 * 32 * 44)


def test_streamed_experts_are_those_of_transformers(saved_model: Callable[[str], Path]) -> None:
    """One layer at a time, from each family's own layout."""
    for family in ("qwen3_moe", "mixtral", "granitemoe", "gpt_oss"):
        checkpoint: Checkpoint = open_checkpoint(saved_model(family))
        whole, streamed = (Weights(checkpoint, streaming=streaming) for streaming in (False, True))
        with streamed.layer(2) as layer:
            own = dict(whole.layers[2].named_parameters())
            for name, parameter in layer.named_parameters():
                assert parameter.equal(own[name]), f"{family}: {name}"


def test_the_text_part_of_gemma3(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=FAMILIES["gemma3_text"],
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    done = convert(tmp_path / "model", tmp_path / "bundle", strategy="dense", max_length=48)
    assert done.manifest.model.family == "gemma3_text" and done.golden
    assert "tensors of images (multi_modal_projector" in done.notes[0]
    run, (ids,) = Executor(Bundle.open(tmp_path / "bundle"), threads=1), random_rows(20, vocabulary=90)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = run.prefill(run.full_cache(1, 48), [ids], all_logits=True)[0]
    assert np.abs(found - expected).max() < TOLERANCE


def test_a_gemma3_without_a_text_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "vision_config": {}}))
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(DynexportError, match="text_config: expected the fields of a gemma3_text, found None"):
        open_checkpoint(tmp_path)
