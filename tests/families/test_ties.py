"""Embedding and head as transformers' from_pretrained takes them, whatever config.json says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.bundle.ties import tied_as_stored
from dynexport.exporter.bundle.weights import WeightReader
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import find_family, read_architecture
from dynexport.exporter.reference import Reference
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.executor import Executor

Change = Callable[[dict[str, np.ndarray]], None]
EMBEDDING = {
    "llama": "model.embed_tokens.weight",
    "gpt2": "transformer.wte.weight",
    "opt": "model.decoder.embed_tokens.weight",
}
IDS = [5, 9, 30, 77, 20]


@pytest.fixture
def model(saved_model: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    def copy(family: str, change: Change, **fields: object) -> Path:
        directory = shutil.copytree(saved_model(family), tmp_path / "model")
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((directory / "config.json").read_text()) | fields
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return copy


def another_head(tensors: dict[str, np.ndarray], embedding: str) -> None:
    tensors["lm_head.weight"] = np.random.default_rng(1).standard_normal(tensors[embedding].shape, np.float32)


def same_head(tensors: dict[str, np.ndarray], embedding: str) -> None:
    tensors["lm_head.weight"] = tensors[embedding].copy()


def only_head(tensors: dict[str, np.ndarray], embedding: str) -> None:
    tensors["lm_head.weight"] = tensors.pop(embedding)


def only_embedding(tensors: dict[str, np.ndarray], embedding: str) -> None:
    tensors.pop("lm_head.weight", None)


@pytest.mark.parametrize(
    ("family", "store", "tied"),
    [
        ("llama", another_head, False),
        ("llama", same_head, True),
        ("llama", only_head, True),
        ("llama", only_embedding, True),
        ("gpt2", another_head, False),
        ("gpt2", only_head, True),
        ("opt", another_head, False),
    ],
)
def test_what_is_stored_says_whether_a_head_is_tied(
    family: str,
    store: Callable[[dict[str, np.ndarray], str], None],
    tied: bool,
    model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    directory = model(family, lambda tensors: store(tensors, EMBEDDING[family]), tie_word_embeddings=True)
    done = convert(directory, tmp_path / "bundle", golden=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    executor = Executor(Bundle.open(done.output), threads=1)
    found = executor.prefill(executor.full_cache(1, len(IDS)), [IDS], all_logits=True)[0]
    np.testing.assert_allclose(found, expected, atol=1e-4)
    checkpoint = open_checkpoint(directory)
    for streaming in (False, True):
        golden = Reference.from_checkpoint(checkpoint, streaming=streaming).logits([IDS])[0]
        np.testing.assert_allclose(golden, expected, atol=1e-5)
    reader = WeightReader(checkpoint, find_family(checkpoint.config), read_architecture(checkpoint.config))
    assert tied_as_stored(reader).tied_embeddings is tied


def test_a_head_that_is_not_tied_has_to_be_stored(model: Callable[..., Path], tmp_path: Path) -> None:
    directory = model("llama", lambda tensors: only_embedding(tensors, ""), tie_word_embeddings=False)
    with pytest.raises(DynexportError, match=r"no tensor lm_head\.weight"):
        convert(directory, tmp_path / "bundle", golden=False)
    assert not (tmp_path / "bundle").exists()


def test_a_head_of_gpt_neox_under_the_name_of_transformers_5(model: Callable[..., Path], tmp_path: Path) -> None:
    """``embed_out`` in the checkpoints of its authors."""

    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["lm_head.weight"] = tensors.pop("embed_out.weight")

    before = convert(model("gpt_neox", lambda tensors: None), tmp_path / "before", golden=False)
    shutil.rmtree(tmp_path / "model")
    after = convert(model("gpt_neox", rename), tmp_path / "after", golden=False)
    assert before.manifest.files["model.data"] == after.manifest.files["model.data"]
