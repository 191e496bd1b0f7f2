"""Names that are no local path: hub ids are downloaded without pickles, all else is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from safetensors.numpy import save_file

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.hub import download, is_hub_id
from dynexport.runtime.bundle.errors import DynexportError


@pytest.fixture(autouse=True)
def no_files_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], list[str]]:
    """A hub with one model of this config.json; what is fetched is told in the list."""

    def with_config(fields: dict[str, Any]) -> list[str]:
        (tmp_path / "config.json").write_text(json.dumps(fields))
        fetched: list[str] = []

        def hf_hub_download(repo_id: str, filename: str) -> str:
            fetched.append(filename)
            return str(tmp_path / filename)

        def snapshot_download(repo_id: str, **options: Any) -> str:
            fetched.append("everything")
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    return with_config


REFUSED = ("deepseek_v3", "gemma3n", "mamba", "t5")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        *[({"model_type": name}, f"model_type: expected one of .* found '{name}'") for name in REFUSED],
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "quantised with awq"),
        ({"model_type": "llama", "residual_multiplier": 0.5}, "residual_multiplier: expected no such field"),
    ],
)
def test_what_the_config_rules_out_is_not_downloaded(
    hub: Callable[[dict[str, Any]], list[str]], fields: dict[str, Any], told: str
) -> None:
    fetched = hub(fields)
    with pytest.raises(DynexportError, match=told):
        download("owner/name")
    assert fetched == ["config.json"]


def test_download(tmp_path: Path, hub: Callable[[dict[str, Any]], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    hub({"model_type": "llama"})
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.source == asked["repo_id"] == "owner/name"
    assert list(checkpoint.names) == ["a"]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    wanted += ["tokenizer.model", "vocab.json", "merges.txt"]
    others = [
        "pytorch_model.bin",
        "a.pt",
        "b.py",
        "onnx/config.json",
        "consolidated.safetensors",
        "original/tokenizer.model",
    ]
    kept = filter_repo_objects(
        wanted + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == wanted


@pytest.mark.parametrize("error", [OSError("no route\nto host"), ValueError(""), RuntimeError("401 denied")])
@pytest.mark.parametrize("call", ["hf_hub_download", "snapshot_download"])
def test_unreachable(
    hub: Callable[[dict[str, Any]], list[str]], monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    hub({"model_type": "llama"})
    monkeypatch.setattr(huggingface_hub, call, fail)
    with pytest.raises(DynexportError) as caught:
        download("owner/name")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("owner/name: ")
    assert (str(error).splitlines() or [type(error).__name__])[0] in message
    assert "network" in message and "local directory" in message


def test_offline_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the real library raises when it may not use the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DynexportError, match="could not be downloaded"):
        open_checkpoint("owner/name")


@pytest.mark.parametrize("model", ["owner/name", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_hub_ids(model: str) -> None:
    assert is_hub_id(model)


@pytest.mark.parametrize(
    "model",
    [
        "gpt2",
        "./name",
        "../name",
        "/a/b",
        "a/b/c",
        "~/name",
        "a b/c",
        "owner/name.gguf",
        "",
        "a/",
        "a/--b",
        "a\0/b",
    ],
)
def test_anything_else_is_a_missing_path(model: str) -> None:
    assert not is_hub_id(model)
    if model:
        with pytest.raises(DynexportError, match="owner/name"):
            open_checkpoint(model)


def test_a_path_is_never_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(DynexportError, match="no such file or directory"):
        open_checkpoint(Path("owner/name"))


def test_other_kinds_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(DynexportError, match=r"model\.bin: expected a Hugging Face directory or a GGUF file"):
        open_checkpoint(tmp_path / "model.bin")


@pytest.mark.parametrize("model", ["x" * 10_000, "~nobody-of-this-name/model"])
def test_names_that_cannot_be_looked_up(model: str) -> None:
    with pytest.raises(DynexportError) as caught:
        open_checkpoint(model)
    assert len(str(caught.value)) < 500
