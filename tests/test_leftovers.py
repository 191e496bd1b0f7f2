"""No tensor of a checkpoint is ignored: read, or named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, checkpoint
from safetensors.numpy import load_file, save_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint.safetensors_directory import SafetensorsDirectory
from dynexport.runtime.bundle.errors import DynexportError


def add(directory: Path, *names: str, shape: tuple[int, ...] = (1,), without: str = "\0") -> Path:
    """Add tensors to a checkpoint, and take away those whose name has ``without``."""
    file = directory / "model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if without not in name}
    tensors |= {name: np.ones(shape, np.float32) for name in names}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def refused(directory: Path, output: Path, **options: Any) -> str:
    with pytest.raises(DynexportError) as caught:
        convert(directory, output, golden=False, **options)
    assert not output.exists()
    return str(caught.value)


UNREAD = {
    "an unknown router": "model.layers.1.router.weight",
    "an unknown skip gate": "model.layers.0.early_exit_gate.weight",
    "a layer beyond the last": "model.layers.4.mlp.down_proj.weight",
    "a bias that the config denies": "model.layers.0.self_attn.q_proj.bias",
    "a norm of another family": "model.layers.0.self_attn.q_norm.weight",
    "another task's head": "score.weight",
    "a value head": "v_head.summary.weight",
    "a bias of the head": "lm_head.bias",
    "a mask of another family": "model.layers.0.attn.bias",
}


@pytest.mark.parametrize("name", UNREAD.values(), ids=UNREAD)
def test_a_tensor_that_nothing_reads_is_named(name: str, tmp_path: Path) -> None:
    directory = add(checkpoint(tmp_path / "model", "dense"), name)
    message = refused(directory, tmp_path / "bundle")
    assert f"expected no tensors but those of a llama as config.json describes it, found {name}; " in message
    assert name in refused(directory, tmp_path / "bundle", strategy="unified-skip", keep=[0, 1])


def test_names_are_checked_before_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = add(checkpoint(tmp_path / "model", "radial-gated-noexit"), "model.layers.1.router.weight")
    read: list[str] = []
    monkeypatch.setattr(SafetensorsDirectory, "read", lambda self, name: read.append(name))
    assert "found model.layers.1.router.weight; " in refused(directory, tmp_path / "bundle")
    add(directory, without="layers.3.mlp.up_proj")
    assert "no tensor model.layers.3.mlp.up_proj.weight" in refused(directory, tmp_path / "bundle")
    assert read == []


def test_many_of_them_are_counted(tmp_path: Path) -> None:
    directory = add(checkpoint(tmp_path / "model", "dense"), *(f"extra.{i:03}" for i in range(500)))
    message = refused(directory, tmp_path / "bundle")
    assert "extra.000, " in message and "extra.005 and 494 more; " in message and len(message) < 700


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.cos_cached"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.3.attn.masked_bias"]),
        (
            "gpt_neox",
            ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"],
        ),
    ],
)
def test_masks_and_rotary_tables_may_be_there(
    family: str, names: list[str], saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = add(shutil.copytree(saved_model(family), tmp_path / "model"), *names)
    assert convert(directory, tmp_path / "bundle", golden=False).notes == ()


ROUTER = "model.layers.3.mod_router.weight"


def test_routers_that_config_json_does_not_declare_make_no_dense_bundle(tmp_path: Path) -> None:
    undeclared = checkpoint(tmp_path / "undeclared", "mod-router", dynexport=None)
    assert "they are routers of mod: declare all of them" in refused(undeclared, tmp_path / "bundle")
    declared = json.loads((CONFORMANCE / "mod-router/config.json").read_text())["dynexport"]
    fewer = checkpoint(tmp_path / "fewer", "mod-router", dynexport={**declared, "routed_layers": [1]})
    message = refused(fewer, tmp_path / "bundle")
    assert ROUTER in message and "layers.1." not in message
    skipped = checkpoint(tmp_path / "skipped", "mod-router", dynexport={"strategy": "unified-skip", "speedups": [2]})
    assert ROUTER in refused(skipped, tmp_path / "bundle")
    radial = checkpoint(tmp_path / "radial", "radial-step", dynexport=None)
    assert "they are routers of radial" in refused(radial, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        ("mod-router", {"strategy": "dense"}, "--strategy dense was asked for"),
        ("radial-step", {"strategy": "dense"}, "--strategy dense was asked for"),
        ("mod-router", {"fields": {"routed_layers": [1]}}, "the contract that was asked for does not use them"),
        ("mod-predictor-normed", {"fields": {"decision": {"rule": "always"}}}, "decision.rule is always"),
    ],
)
def test_routers_that_the_user_leaves_out_are_told(
    case: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (note,) = convert(CONFORMANCE / case, tmp_path / "bundle", golden=False, **options).notes
    assert note.startswith("left out: model.") and note.endswith(f"; {reason}")


def test_a_mod_checkpoint_with_an_unknown_router_beside_its_own(tmp_path: Path) -> None:
    directory = add(checkpoint(tmp_path / "model", "mod-router"), "model.layers.1.depth_router.weight")
    for options in ({}, {"strategy": "dense"}, {"fields": {"capacity": 0.5}}):
        assert "found model.layers.1.depth_router.weight; " in refused(directory, tmp_path / "bundle", **options)
