"""Bundles of imported checkpoints against the methods themselves: logits, decisions and greedy tokens.

Of every method one small checkpoint in its own layout is converted as it is, and run on ONNX Runtime: two rows in one
batch, the prompt at once and then token by token. ``methods.py`` is what it must agree with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from imported_bundle import ImportedBundle
from methods import DLLM, DLO, DLOExAttn, FlexiDepth, FlexiDepthQwen3, Llama, MindSkip, SkipGPT, Stored, write

from dynexport.exporter.parity.constants import differences

PROMPT, TOKENS = 9, 16
ROWS = [[(31 * i + i * i) % 97 for i in range(TOKENS)], [(17 * i + 5) % 97 for i in range(TOKENS)]]
# Nearer to a threshold, rounding may decide.
NEAR = 1e-4


@dataclass(frozen=True)
class Method:
    """A method: its model of stored tensors, and a checkpoint."""

    model: Callable[[dict[str, np.ndarray]], Llama]
    stored: Callable[[], Stored]


METHODS = {
    "flexidepth": Method(FlexiDepth, FlexiDepth.stored),
    "flexidepth-qwen3": Method(FlexiDepthQwen3, FlexiDepthQwen3.stored),
    "skipgpt": Method(SkipGPT.reading, SkipGPT.stored),
    "skipgpt-two-layers": Method(SkipGPT.reading, lambda: SkipGPT.stored(two_layers=True, blocks=True)),
    "d-llm": Method(DLLM, DLLM.stored),
    "mindskip": Method(MindSkip, lambda: MindSkip.stored(seed=1)),
    "mindskip-qwen2": Method(MindSkip, lambda: MindSkip.stored(family="qwen2")),
    "dlo": Method(DLO, DLO.stored),
    "dlo-exattn": Method(DLOExAttn, DLOExAttn.stored),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ImportedBundle]:
    @cache
    def converted(method: str) -> ImportedBundle:
        directory: Path = tmp_path_factory.mktemp(method)
        return ImportedBundle(write(directory / "model", METHODS[method].stored()), directory / "bundle")

    return converted


def decisions(model: Llama) -> np.ndarray:
    """What the model has decided, bool [decisions, tokens]: layer by layer, attention before the MLP."""
    return np.stack([np.broadcast_to(ran.numpy(), TOKENS) for _, ran in sorted(model.ran.items())])


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_decisions(method: str, bundle: Callable[[str], ImportedBundle]) -> None:
    model = METHODS[method].model(METHODS[method].stored()[1])
    varied = []
    for row, (logits, chosen) in zip(ROWS, bundle(method).answer(ROWS, PROMPT), strict=True):
        expected = model.logits(row, PROMPT)
        assert min(model.margins) > NEAR, "choose another seed"
        np.testing.assert_array_equal(chosen, decisions(model))
        np.testing.assert_allclose(logits, expected, atol=2e-4)
        varied.append(chosen)
    assert np.any(varied) and not np.all(varied)


@pytest.mark.parametrize("method", METHODS)
def test_greedy_tokens(method: str, bundle: Callable[[str], ImportedBundle]) -> None:
    model = METHODS[method].model(METHODS[method].stored()[1])
    assert bundle(method).greedy(ROWS[0][:PROMPT], 12) == model.greedy(ROWS[0][:PROMPT], 12)


def test_a_prompt_of_one_token(bundle: Callable[[str], ImportedBundle]) -> None:
    model = MindSkip(METHODS["mindskip"].stored()[1])
    for row, (logits, chosen) in zip(ROWS, bundle("mindskip").answer(ROWS, 1), strict=True):
        np.testing.assert_allclose(logits, model.logits(row, 1), atol=2e-4)
        np.testing.assert_array_equal(chosen, decisions(model))


@pytest.mark.parametrize("method", METHODS)
def test_constants_are_those_of_the_contract(method: str, bundle: Callable[[str], ImportedBundle]) -> None:
    assert not differences(bundle(method).executor.bundle)
