"""Bundles of models whose rotary frequencies depend on the context: longrope and dynamic, against transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import change_manifest, dynexport
from tiny_models import FAMILIES, random_rows, save_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.parity.constants import differences
from dynexport.exporter.parity.verification import verify
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

ORIGINAL, LONGEST = 16, 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 5.0, 9.0],
}
# float32 on both sides, added up in another order.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["phi3", "llama"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    fields = {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}
    save_model(directory, request.param, {**FAMILIES[request.param], **fields})
    return directory


def of_transformers(model: Path, row: list[int]) -> np.ndarray:
    """Logits float32 [length, vocabulary] of the model as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return np.array(loaded(torch.tensor([row])).logits[0].numpy())


def of_bundle(bundle: Path, row: list[int]) -> np.ndarray:
    executor = Executor(Bundle.open(bundle), threads=1)
    return np.asarray(executor.prefill(executor.full_cache(1, len(row)), [row], all_logits=True)[0])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / expected.std())


def test_the_context_of_a_longrope_model_is_its_original_length(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "bundle", golden=False)
    assert done.manifest.model.max_length == ORIGINAL
    (note,) = done.notes
    assert "longrope: the short set" in note and "--max-length 17 to 64" in note
    (row,) = random_rows(ORIGINAL)
    assert error(of_bundle(tmp_path / "bundle", row), of_transformers(model, row)) < TOLERANCE


def test_a_longer_context_takes_the_long_set_at_every_length(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "bundle", max_length=40)
    (note,) = done.notes
    assert "longrope: the long set" in note and "up to 16 tokens" in note
    long, short = random_rows(40, ORIGINAL)
    expected = of_transformers(model, long)
    assert error(of_bundle(tmp_path / "bundle", long), expected) < TOLERANCE
    assert error(of_bundle(tmp_path / "bundle", short), of_transformers(model, short)) > 100 * TOLERANCE
    # Short prompts among them, which transformers by itself would rotate by the short set.
    against = model if "llama" in model.name else None
    assert verify(Bundle.open(tmp_path / "bundle"), against).passed, "or its golden vectors"


def test_constants_of_the_graph_are_those_of_the_context(model: Path, tmp_path: Path) -> None:
    """Without running anything: the other set of frequencies, and another factor of cos and sin."""
    convert(model, tmp_path / "bundle", golden=False, max_length=40)
    assert differences(Bundle.open(tmp_path / "bundle")) == []
    for change, words in (
        ({"long_factor": LONGROPE["short_factor"]}, "rotary frequencies"),
        ({"attention_factor": 1.5}, "factor of angles: expected {1.5}"),
    ):
        other = shutil.copytree(tmp_path / "bundle", tmp_path / words[:6])
        change_manifest(
            other, lambda fields, change=change: fields["source"]["config"]["rope_parameters"].update(change)
        )
        assert any(words in difference for difference in differences(Bundle.open(other)))


def test_the_command_says_which_set_and_refuses_more(model: Path, tmp_path: Path) -> None:
    ran = dynexport("convert", model, "-o", tmp_path / "bundle", "--no-golden", "--max-length", 17, "--json", "-")
    assert ran.code == 0 and "the long set" in ran.report["notes"][0]
    ran = dynexport("convert", model, "-o", tmp_path / "bundle", "--no-golden", "--max-length", LONGEST + 1)
    assert ran.code == 2 and "max_length: expected 1..64 tokens, found 65" in ran.err


def test_a_dynamic_model_ends_where_its_frequencies_change(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    save_model(tmp_path / "model", "llama", {**FAMILIES["llama"], **fields})
    assert convert(tmp_path / "model", tmp_path / "bundle", golden=False).manifest.model.max_length == LONGEST
    (row,) = random_rows(LONGEST)
    assert error(of_bundle(tmp_path / "bundle", row), of_transformers(tmp_path / "model", row)) < TOLERANCE
    with pytest.raises(DynexportError, match=r"max_length: expected 1\.\.64 tokens, found 65; beyond, dynamic rope"):
        convert(tmp_path / "model", tmp_path / "bundle", golden=False, max_length=LONGEST + 1)
