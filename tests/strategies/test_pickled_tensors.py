"""The sample that turns pickled routers into safetensors: what it makes of a model and a pickle is recognised."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from methods import DLLM, LAYERS, SkipGPT, write
from pickled_tensors import combine

from dynexport.exporter.strategies.importing import open_imported


def pickled(path: Path, tensors: dict[str, np.ndarray], *, inside: bool = False) -> Path:
    found = {name: torch.from_numpy(value) for name, value in tensors.items()}
    torch.save({"epoch": 9, "model": found, "optimizer": None} if inside else found, path)
    return path


def test_routers_beside_a_model(tmp_path: Path) -> None:
    config, tensors = SkipGPT.stored()
    routers = {name: value for name, value in tensors.items() if ".router_" in name}
    model = write(tmp_path / "model", (config, {name: tensors[name] for name in tensors if name not in routers}))
    assert open_imported(model).importer is None
    count = combine(model, [pickled(tmp_path / "router.pth", routers)], tmp_path / "combined")
    checkpoint = open_imported(tmp_path / "combined")
    assert (count, checkpoint.importer) == (len(tensors), "skipgpt")
    np.testing.assert_array_equal(
        checkpoint.read("model.layers.2.mod_mlp_router.bias"),
        routers["model.layers.2.router_mlp.weight_predictor.bias"],
    )
    assert (tmp_path / "combined" / "model-0.safetensors").stat().st_nlink == 2


def test_metas_layout(tmp_path: Path) -> None:
    config, tensors = DLLM.stored()
    trained = {name: value for name, value in tensors.items() if ".router." in name or ".lora_" in name}
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "params.json").write_text(json.dumps(config))
    base = {name: value for name, value in tensors.items() if name not in trained}
    pickles = [
        pickled(tmp_path / "llama" / "consolidated.00.pth", base),
        pickled(tmp_path / "checkpoint-9.pth", trained, inside=True),
    ]
    combine(tmp_path / "llama", pickles, tmp_path / "combined")
    assert not list((tmp_path / "combined").glob("*.pth"))
    checkpoint = open_imported(tmp_path / "combined")
    assert (checkpoint.importer, checkpoint.config["num_hidden_layers"]) == ("d-llm", LAYERS)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("ran",)


def test_a_pickle_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = write(tmp_path / "model", SkipGPT.stored())
    torch.save({"a": Evil()}, tmp_path / "router.pth")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        combine(model, [tmp_path / "router.pth"], tmp_path / "combined")
    assert not (tmp_path / "ran").exists()


def test_a_tensor_that_both_have(tmp_path: Path) -> None:
    config, tensors = SkipGPT.stored()
    path = pickled(tmp_path / "router.pth", {"lm_head.weight": tensors["lm_head.weight"]})
    with pytest.raises(SystemExit, match=r"lm_head\.weight: expected in one file"):
        combine(write(tmp_path / "model", (config, tensors)), [path], tmp_path / "combined")
