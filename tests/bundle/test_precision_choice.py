"""The precision that ``auto`` chooses for weights that are not quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import checkpoint
from safetensors.torch import load_file, save_file

from dynexport.exporter.bundle.options import TargetOptions
from dynexport.exporter.bundle.precision import choose_precision
from dynexport.exporter.checkpoint import open_checkpoint

_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def stored_as(directory: Path, matrices: str, vectors: str = "F32") -> Path:
    """A checkpoint whose tensors have these types."""
    saved = checkpoint(directory)
    (file,) = saved.glob("*.safetensors")
    types = {2: _TYPES[matrices], 1: _TYPES[vectors]}
    save_file({name: value.to(types[value.dim()]) for name, value in load_file(file).items()}, file, {"format": "pt"})
    return saved


@pytest.mark.parametrize(
    ("matrices", "options", "chosen", "note"),
    [
        ("F32", TargetOptions(plugins=True), "fp32", ""),
        ("F16", TargetOptions(plugins=True), "fp16", ""),
        ("BF16", TargetOptions(plugins=True), "bf16", ""),
        ("BF16", TargetOptions(), "fp32", "bf16 weights in twice their bytes"),
        ("F16", TargetOptions(), "fp32", "fp16 weights in twice their bytes"),
        ("BF16", TargetOptions(target="tensorrt"), "fp32", ""),
        ("BF16", TargetOptions(precision="int8"), "int8", ""),
    ],
)
def test_16_bits_are_kept_where_operators_read_them(
    matrices: str, options: TargetOptions, chosen: str, note: str, tmp_path: Path
) -> None:
    opened = open_checkpoint(stored_as(tmp_path / "checkpoint", matrices))
    precision, notes = choose_precision(options, opened)
    assert precision == chosen
    assert len(notes) == bool(note) and all(note in found for found in notes)


def test_matrices_of_several_types_become_fp32(tmp_path: Path) -> None:
    saved = stored_as(tmp_path / "checkpoint", "BF16")
    (file,) = saved.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].float()
    save_file(tensors, file, {"format": "pt"})
    assert choose_precision(TargetOptions(plugins=True), open_checkpoint(saved)) == ("fp32", ())


def test_the_values_read_do_not_depend_on_the_type(tmp_path: Path) -> None:
    opened = open_checkpoint(stored_as(tmp_path / "checkpoint", "BF16", "BF16"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert opened.stored_type(name) == "BF16"
    found = torch.from_numpy(opened.read(name))
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), found.bfloat16().float().numpy())
