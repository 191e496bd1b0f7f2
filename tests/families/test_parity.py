"""Every family and strategy against PyTorch: random weights, lengths and batches that no graph was built with.

A conversation is forced through both sides: a prompt, generated tokens in one kept set, a second prompt on top of the
same cache, generated tokens in another kept set. After it the skipped layers' caches have gaps, so that original
positions (rotary, ALiBi, windows) differ from the entries' places.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tiny_models import FAMILIES, LAYERS, VARIANTS, random_rows

from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.conversion import convert
from dynexport.exporter.families import families
from dynexport.exporter.reference import Reference
from dynexport.runtime.bundle import Bundle
from dynexport.runtime.decoder import Decoder
from dynexport.runtime.manifest import Speedup

pytest.importorskip("transformers")

MODELS = [*FAMILIES, *VARIANTS]
# float32 on both sides, added up in another order: 1e-6 to 2e-5 of the logits' standard deviation is measured.
TOLERANCE = 1e-4
PROMPTS = (1, 2, 9, 23)
SECOND_PROMPTS = (6, 1, 3, 11)
GENERATED = 4
# The official rule keeps 2 and 3 of 4 layers.
RATIOS = (2.0, 1.25)
FIRST_KEPT, SECOND_KEPT = (0, 3), (0, 2, 3)
SLOTS = max(p + s for p, s in zip(PROMPTS, SECOND_PROMPTS, strict=True)) + 2 * GENERATED
STRATEGIES = {
    "dense": {"strategy": "dense"},
    "conditional": {"strategy": "unified-skip", "speedups": RATIOS},
    "static": {"strategy": "unified-skip", "speedups": RATIOS, "static": True},
}


@dataclass(frozen=True)
class Conversation:
    """Four rows of forced tokens and the logits that PyTorch gives for all of them.

    Attributes:
        prompts, first, second_prompts, second: token ids by row; ``first`` and ``second`` stand for generated ones.
        expected: logits float32 [length, vocabulary] by row.
    """

    prompts: list[list[int]]
    first: list[list[int]]
    second_prompts: list[list[int]]
    second: list[list[int]]
    expected: list[np.ndarray]


def converse(reference: Reference, first_kept: tuple[int, ...], second_kept: tuple[int, ...]) -> Conversation:
    prompts, second_prompts = random_rows(*PROMPTS), random_rows(*SECOND_PROMPTS, seed=4)
    generated = [random_rows(*[GENERATED] * len(PROMPTS), seed=seed) for seed in (5, 6)]
    parts = (prompts, generated[0], second_prompts, generated[1])
    everywhere = tuple(range(LAYERS))
    rows, runs = [], []
    for row_parts in zip(*parts, strict=True):
        rows.append([token for part in row_parts for token in part])
        kept = (everywhere, first_kept, everywhere, second_kept)
        columns = [
            np.repeat(np.isin(range(LAYERS), k)[:, None], len(p), 1) for k, p in zip(kept, row_parts, strict=True)
        ]
        runs.append(np.concatenate(columns, axis=1))
    return Conversation(*parts, reference.logits(rows, runs))


@pytest.fixture(scope="module")
def reference(saved_model: Callable[[str], Path]) -> Callable[[str], Reference]:
    return cache(lambda name: Reference.from_checkpoint(open_checkpoint(saved_model(name))))


@pytest.fixture(scope="module")
def decoder(
    saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Decoder]:
    @cache
    def make(name: str, strategy: str) -> Decoder:
        bundle = tmp_path_factory.mktemp("bundle") / "b"
        convert(saved_model(name), bundle, max_length=48, golden=False, **STRATEGIES[strategy])
        return Decoder(Bundle.open(bundle), threads=2)

    return make


def kept_set(*layers: int) -> Speedup:
    return Speedup(name="test", ratio=None, keep=layers)


def assert_close(found: np.ndarray, expected: np.ndarray, where: str) -> None:
    error = np.abs(found - expected).max() / expected.std()
    assert error < TOLERANCE, f"{where}: {error:.1e} of the logits' standard deviation"


def follow(
    decoder: Decoder, talk: Conversation, rows: list[int], first: Speedup, second: Speedup, chunk: int = 64
) -> None:
    """Force some rows of the conversation through the decoder, comparing after every token."""
    state = decoder.cache(len(rows), SLOTS)

    def prompt(prompts: list[list[int]], what: str) -> None:
        begin = state.positions.copy()
        found = decoder.prefill(state, [prompts[row] for row in rows], chunk=chunk, all_logits=True)
        for logits, row, start in zip(found, rows, begin, strict=True):
            assert_close(logits, talk.expected[row][start : start + len(logits)], f"{what}, row {row}")

    def generate(tokens: list[list[int]], kept: Speedup, what: str) -> None:
        for step in range(GENERATED):
            begin = state.positions.copy()
            found = decoder.step(state, [tokens[row][step] for row in rows], kept)
            for logits, row, start in zip(found, rows, begin, strict=True):
                assert_close(logits, talk.expected[row][start], f"{what}, row {row}, step {step}")

    prompt(talk.prompts, "prompt")
    generate(talk.first, first, "first answer")
    prompt(talk.second_prompts, "second prompt")
    generate(talk.second, second, "second answer")


def test_every_family_has_a_model() -> None:
    assert set(FAMILIES) == set(families())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_conversation(
    name: str,
    strategy: str,
    reference: Callable[[str], Reference],
    decoder: Callable[[str, str], Decoder],
) -> None:
    everything = tuple(range(LAYERS))
    first, second = (everything, everything) if strategy == "dense" else (FIRST_KEPT, SECOND_KEPT)
    talk = converse(reference(name), first, second)
    run = decoder(name, strategy)
    kept = kept_set(*first), kept_set(*second)
    follow(run, talk, [0, 1, 2, 3], *kept)
    follow(run, talk, [3], *kept)
    follow(run, talk, [2, 3], *kept, chunk=4)
