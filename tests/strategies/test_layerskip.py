"""A LayerSkip checkpoint, a plain Llama, in the words of its users; judged by PyTorch on a model cut short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bundles import Ran, dynexport, error_of
from transformers import AutoModelForCausalLM

from dynexport.runtime import Bundle

EXIT, NEW = 2, 12
PROMPTS = [[3, 14, 15, 9, 26], [5, 3, 5]]


@pytest.fixture(scope="module")
def checkpoint(saved_model: Callable[[str], Path]) -> Path:
    """Four layers of random weights; a trained one has no other tensor or field."""
    return saved_model("llama")


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("layerskip") / "bundle"
    arguments = ["--strategy", "early-exit", "--exit", EXIT, "--no-golden", "-o", made]
    assert dynexport("convert", checkpoint, *arguments).code == 0
    return made


def greedy(checkpoint: Path, layers: int, prompt: list[int]) -> list[int]:
    """LayerSkip's autoregressive generation with an exit layer: the layers before it, then norm and head."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:layers]
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):  # without a cache, all tokens run again: prompt and generated ones in the same layers
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == model.config.eos_token_id:
                break
    return ids[len(prompt) :]


def ran(bundle: Path, prompt: list[int], *arguments: object) -> Ran:
    ids = ",".join(map(str, prompt))
    return dynexport("run", bundle, "--ids", ids, "--max-new-tokens", NEW, "--json", "-", *arguments)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_an_exit_is_a_model_cut_short(prompt: list[int], bundle: Path, checkpoint: Path) -> None:
    shallow, whole = greedy(checkpoint, EXIT, prompt), greedy(checkpoint, 4, prompt)
    assert shallow != whole
    assert ran(bundle, prompt, "--depth", f"exit-{EXIT}").report["ids"] == shallow
    assert ran(bundle, prompt).report["ids"] == whole


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_speculation_by_the_exit_is_the_whole_model(prompt: list[int], bundle: Path, checkpoint: Path) -> None:
    found = ran(bundle, prompt, "--speculate", 6, "--draft", "exit").report
    assert found["ids"] == greedy(checkpoint, 4, prompt)
    assert any(draft is not None for draft in found["drafts"])


def test_what_the_option_says(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert [(depth.name, depth.keep, depth.prompt) for depth in manifest.depths] == [("exit-2", (0, 1), (0, 1))]
    assert Bundle.open(bundle).depth("exit") == manifest.depths[0]
    two = ["convert", checkpoint, "--strategy", "early-exit", "--exit", 3, "--exit", 1, "--no-golden", "-o", tmp_path]
    assert dynexport(*two, "--set", "prompt=full").code == 0
    opened = Bundle.open(tmp_path)
    assert [(depth.name, len(depth.prompt)) for depth in opened.manifest.depths] == [("exit-1", 4), ("exit-3", 4)]
    assert "depth: expected 1, exit-1, exit-3; found exit" in error_of(
        dynexport("run", tmp_path, "--ids", "1", "--depth", "exit")
    )
    for exit_layer, message in ((4, "exits: expected 1..3 of 4 layers, found 4"), (0, "expected ascending numbers")):
        wrong = ["--strategy", "early-exit", "--exit", exit_layer, "-o", tmp_path / "wrong"]
        assert message in error_of(dynexport("convert", checkpoint, *wrong))
