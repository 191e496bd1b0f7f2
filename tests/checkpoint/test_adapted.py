"""An adapter of the peft library: its merged weights are peft's and PyTorch's, and all damage is told in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_models import write_gguf
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, save_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError

RANK, ALPHA = 4, 7
QUERY, DOWN = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    save_model(directory, "llama", FAMILIES["llama"])
    return directory


def save_adapter(directory: Path, base: Path, modules: tuple[str, ...] = (QUERY, DOWN), **fields: Any) -> Path:
    """Save an adapter with random factors for some modules of a checkpoint."""
    directory.mkdir()
    generator = np.random.default_rng(3)
    shapes = {name: values.shape for name, values in load_file(base / "model.safetensors").items()}
    tensors = {}
    for module in modules:
        outputs, inputs = shapes[f"{module}.weight"]
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = generator.standard_normal((RANK, inputs)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = generator.standard_normal((outputs, RANK)).astype(np.float32)
        if fields.get("use_dora"):
            tensors[f"{name}.lora_magnitude_vector"] = generator.uniform(1, 2, outputs).astype(np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": "them/tiny", **fields}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def expected(base: Path, adapter: Path, module: str, scale: float) -> np.ndarray:
    """The merged weight in float64: each of its columns is what the adapted layer answers to a unit vector."""
    factors = load_file(adapter / "adapter_model.safetensors")
    weight = load_file(base / "model.safetensors")[f"{module}.weight"].astype(np.float64)
    name = f"base_model.model.{module}"
    down, up = (factors[f"{name}.{part}.weight"].astype(np.float64) for part in ("lora_A", "lora_B"))
    answers = [weight @ unit + scale * (up @ (down @ unit)) for unit in np.eye(weight.shape[1])]
    total = np.stack(answers, axis=1)
    lengths = factors.get(f"{name}.lora_magnitude_vector")
    return total if lengths is None else total * (lengths / np.sqrt((total**2).sum(1)))[:, None]


@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({}, ALPHA / RANK),
        ({"use_rslora": True}, ALPHA / RANK**0.5),
        ({"use_dora": True}, ALPHA / RANK),
        ({"r": 2, "rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}}, 5 / RANK),
    ],
    ids=["plain", "rslora", "dora", "patterns"],
)
def test_merged_weights(base: Path, tmp_path: Path, fields: dict[str, Any], scale: float) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, (QUERY,), **fields)
    checkpoint, before = open_checkpoint(base, adapter=adapter), open_checkpoint(base)
    np.testing.assert_allclose(
        checkpoint.read(f"{QUERY}.weight"), expected(base, adapter, QUERY, scale), rtol=1e-5, atol=1e-5
    )
    others = [name for name in before.names if name != f"{QUERY}.weight"]
    assert all(np.array_equal(checkpoint.read(name), before.read(name)) for name in others)
    assert list(checkpoint.names) == list(before.names)


PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "target_modules": ["q_proj", "lm_head"]}),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "wte"]}),  # Conv1D, square ones too, and an embedding
    "opt": ("opt", {"target_modules": "all-linear", "bias": "all"}),
}


@pytest.mark.parametrize("case", PEFT)
def test_like_peft(case: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoModelForCausalLM

    family, fields = PEFT[case]
    save_model(tmp_path / "base", family, FAMILIES[family])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trained = peft.get_peft_model(trained, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM", **fields))
    torch.manual_seed(1)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    wanted = again.merge_and_unload().state_dict()
    checkpoint = open_checkpoint(tmp_path / "base", adapter=tmp_path / "adapter")
    before = open_checkpoint(tmp_path / "base")
    changed = 0
    for name in checkpoint.names:
        stored = next(other for other in (name, f"transformer.{name}", f"model.{name}") if other in wanted)
        np.testing.assert_allclose(checkpoint.read(name), wanted[stored].numpy(), rtol=1e-5, atol=1e-6)
        changed += not np.array_equal(checkpoint.read(name), before.read(name))
    assert changed > 3


def test_a_bundle_has_the_adapter_and_its_contract(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    contract = {"dynexport": {"strategy": "unified-skip", "speedups": [2]}, "model_type": "other"}
    (adapter / "config.json").write_text(json.dumps(contract))
    done = convert(base, tmp_path / "bundle", adapter=adapter, golden=False)
    manifest = done.manifest
    assert manifest.trained and [depth.ratio for depth in manifest.depths] == [2]
    assert manifest.source.adapter == str(adapter) and manifest.source.config["model_type"] == "llama"
    assert done.notes == ()
    bundle = Bundle.open(tmp_path / "bundle")
    assert verify(bundle, base, adapter=adapter, new_tokens=2, prompts=[[1, 2, 3]]).passed
    with pytest.raises(DynexportError, match="--adapter: expected that of the bundle"):
        verify(bundle, base, prompts=[[1, 2, 3]])


def test_a_changed_matrix_of_a_gguf_file_has_no_blocks(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", "llama", lambda name: Kind.Q4_1)
    before = open_checkpoint(tmp_path / "model.gguf")
    directory = tmp_path / "plain"
    directory.mkdir()
    save_file({f"{QUERY}.weight": before.read(f"{QUERY}.weight")}, directory / "model.safetensors")
    adapter = save_adapter(tmp_path / "adapter", directory, (QUERY,))
    after = open_checkpoint(tmp_path / "model.gguf", adapter=adapter)
    name, other = f"{QUERY}.weight", f"{DOWN}.weight"
    assert before.form(name) is not None and after.form(name) is None and after.blocks(name) is None
    assert after.stored_type(name) == "F32" and after.stored_type(other) == before.stored_type(other)
    assert after.form(other) == before.form(other) is not None
    np.testing.assert_allclose(
        after.read(name), expected(directory, adapter, QUERY, ALPHA / RANK), rtol=1e-4, atol=1e-4
    )


def changed_config(adapter: Path, **fields: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def changed_tensors(adapter: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


UP = f"base_model.model.{QUERY}.lora_B.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda at: (at / "adapter_config.json").unlink(), "expected adapter_config.json"),
    "no weights": (lambda at: (at / "adapter_model.safetensors").unlink(), "expected adapter_model.safetensors, found"),
    "pickle": (_pickled, "adapter_model.bin"),
    "kind": (lambda at: changed_config(at, peft_type="IA3"), "peft_type: expected LORA, found 'IA3'"),
    "field": (lambda at: changed_config(at, layer_replication=[[0, 2]]), "layer_replication: expected a plain LoRA"),
    "beginning": (lambda at: changed_config(at, init_lora_weights="pissa"), "init_lora_weights: .*'pissa'"),
    "rank 0": (lambda at: changed_config(at, r=0), "r: expected a rank of 1..65536, found 0"),
    "rank true": (lambda at: changed_config(at, r=True), "r: expected a rank"),
    "alpha": (lambda at: changed_config(at, lora_alpha="8"), "lora_alpha: expected a finite number"),
    "flag": (lambda at: changed_config(at, use_rslora="yes"), "use_rslora: expected true or false"),
    "pattern": (lambda at: changed_config(at, rank_pattern={"(a+)+$": 4}), "rank_pattern: expected names of modules"),
    "other rank": (
        lambda at: changed_config(at, r=5),
        r"lora_A.weight: expected \[5, 32\] .*found \[4, 32\].*them/tiny",
    ),
    "other base": (
        lambda at: changed_tensors(at, lambda found: found.update({UP: np.zeros((48, RANK), np.float32)})),
        r"lora_B.weight: expected \[32, 4\] .*found \[48, 4\]; name the model that it was trained on, them/tiny",
    ),
    "half": (lambda at: changed_tensors(at, lambda found: found.pop(UP)), "expected lora_B of the same module too"),
    "unknown module": (
        lambda at: changed_tensors(at, lambda found: found.update({UP.replace("q_proj", "z_proj"): found.pop(UP)})),
        "expected",
    ),
    "unknown tensor": (
        lambda at: changed_tensors(at, lambda found: found.update({"base_model.model.more": np.zeros(3, np.float32)})),
        "more",
    ),
    "no prefix": (
        lambda at: changed_tensors(at, lambda found: found.update({"more": np.zeros(3, np.float32)})),
        "a name that begins with base_model.model.",
    ),
    "magnitudes": (lambda at: changed_config(at, use_dora=True), "expected a magnitude vector as use_dora says"),
    "lora bias": (
        lambda at: changed_tensors(
            at, lambda found: found.update({UP.replace("weight", "bias"): np.zeros(32, np.float32)})
        ),
        "expected factors of matrices",
    ),
    "nan": (
        lambda at: changed_tensors(at, lambda found: found.update({UP: np.full((32, RANK), np.nan, np.float32)})),
        "expected finite numbers",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_in_one_line(base: Path, tmp_path: Path, damage: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    change, message = DAMAGES[damage]
    change(adapter)
    with pytest.raises(DynexportError, match=message) as caught:
        convert(base, tmp_path / "bundle", adapter=adapter, golden=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "bundle").exists()
