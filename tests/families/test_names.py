"""Where tensors come from: checkpoints of the bare model leave out the prefix that the model with a head has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.families import families
from dynexport.runtime.bundle.errors import DynexportError

pytest.importorskip("transformers")

WEIGHTS = "model.safetensors"


def renamed(model: Path, copy: Path, rename: Callable[[str], str | None]) -> Path:
    """A copy of a model with other names of its tensors; None leaves one out."""
    copy.mkdir()
    shutil.copy(model / "config.json", copy)
    tensors = {rename(name): tensor for name, tensor in load_file(model / WEIGHTS).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name is not None}, copy / WEIGHTS)
    return copy


@pytest.mark.parametrize("family", [family for family in FAMILIES if families()[family].base_prefix])
def test_a_bare_model_gives_the_same_weights(family: str, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    prefix = families()[family].base_prefix
    bare = renamed(saved_model(family), tmp_path / "bare", lambda name: name.removeprefix(prefix))
    models = {"whole": saved_model(family), "bare": bare}
    hashes = {
        convert(model, tmp_path / f"{name}-bundle", golden=False).manifest.files["model.data"].sha256
        for name, model in models.items()
    }
    assert set(load_file(bare / WEIGHTS)) != set(load_file(saved_model(family) / WEIGHTS))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("llama", "model.layers.2.self_attn.v_proj.weight"),
        ("phi3", "model.layers.0.mlp.gate_up_proj.weight"),
        ("bloom", "transformer.h.3.self_attention.query_key_value.bias"),
        ("gpt_neox", "embed_out.weight"),
    ],
)
def test_an_absent_tensor_is_named_and_leaves_no_bundle(
    family: str, lost: str, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = renamed(saved_model(family), tmp_path / "model", lambda name: None if name == lost else name)
    with pytest.raises(DynexportError, match=lost):
        convert(model, tmp_path / "bundle", golden=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tensor_of_another_shape_is_named(saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = renamed(saved_model("llama"), tmp_path / "model", lambda name: name)
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**tensors, name: np.zeros((8, 32), np.float32)}, model / WEIGHTS)
    with pytest.raises(DynexportError, match=rf"{name}.*expected shape \[64, 32\].*found \[56, 32\]"):
        convert(model, tmp_path / "bundle", golden=False)
