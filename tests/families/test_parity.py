"""Every family and strategy against PyTorch: random weights, lengths and batches that no graph was built with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conversation import EVERYTHING, Conversation, follow, generate
from tiny_models import EXEMPLARS, FAMILIES, LAYERS, LOOPED, VARIANTS, random_rows

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.families import families
from dynexport.exporter.parity.constants import angle_differences, differences
from dynexport.exporter.reference import Reference
from dynexport.exporter.strategies.unified_skip.reference import unified_skip_runs
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

# float32 on both sides, added up in another order: at most 1.3e-5 is measured.
TOLERANCE = 1e-4
# Shorter than the models' own, so that tables of positions are longer than what a bundle uses of them.
CONTEXT = 48
# The official rule keeps 2 and 3 of 4 layers.
SKIP = {"strategy": "unified-skip", "speedups": (2.0, 1.25)}
STRATEGIES = {"dense": {"strategy": "dense"}, "conditional": SKIP, "static": {**SKIP, "static": True}}
DECLARED = ((0, 3), (0, 2, 3))
KEPT_SETS = {"dense": [(EVERYTHING, EVERYTHING)], "conditional": [DECLARED], "static": [DECLARED]}
# One graph serves any kept set, also without the first and the last layer.
OTHER_KEPT_SETS = [((1, 2), (1,)), (EVERYTHING, (3,))]


# All ways for exemplars; the graph with conditions, which is a dense one too, for the others and for variants.
CASES = [
    (name, strategy)
    for name in (*FAMILIES, *VARIANTS)
    for strategy in STRATEGIES
    if strategy == "conditional" or name in EXEMPLARS
]

Models = Callable[[str], Reference]
Executors = Callable[[str, str], Executor]


@pytest.fixture(scope="module")
def reference(saved_model: Callable[[str], Path]) -> Models:
    return cache(lambda name: Reference.from_checkpoint(open_checkpoint(saved_model(name))))


@pytest.fixture(scope="module")
def executor(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Executors:
    @cache
    def make(name: str, strategy: str) -> Executor:
        bundle = tmp_path_factory.mktemp("bundle") / strategy
        convert(saved_model(name), bundle, max_length=CONTEXT, golden=False, **STRATEGIES[strategy])
        return Executor(Bundle.open(bundle), threads=1)

    return make


def test_every_family_has_a_model() -> None:
    assert {*FAMILIES, *LOOPED} == set(families())


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_conversation(name: str, strategy: str, reference: Models, executor: Executors) -> None:
    run = executor(name, strategy)
    others = OTHER_KEPT_SETS if strategy == "conditional" and name in EXEMPLARS else []
    for kept in KEPT_SETS[strategy] + others:
        talk = Conversation.forced(reference(name), *kept)
        assert follow(run, talk, rows=[0, 1, 2, 3]).max() < TOLERANCE, "right-padded batch"
        assert follow(run, talk, rows=[3]).max() < TOLERANCE, "one row"
        assert follow(run, talk, rows=[2, 3], chunk=4).max() < TOLERANCE, "in pieces"


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_constants_are_those_of_the_config(name: str, strategy: str, executor: Executors) -> None:
    bundle = executor(name, strategy).bundle
    assert differences(bundle) == []
    assert strategy != "conditional" or angle_differences(bundle.manifest) == []


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "opt", "bloom"])
def test_the_last_position(name: str, reference: Models, executor: Executors) -> None:
    """A context filled to its end, beside a short row whose padding reaches the end as well."""
    long, short = random_rows(CONTEXT - 1, 5)
    token, keep, run = 7, (0, 3), executor(name, "conditional")
    runs = [unified_skip_runs(len(row), len(row) + 1, keep, LAYERS) for row in (long, short)]
    expected = reference(name).logits([[*long, token], [*short, token]], runs)
    state = run.full_cache(2, CONTEXT)
    found = [np.stack(run.prefill(state, [long, short])), generate(run, state, [token, token], keep)]
    error = np.abs(np.concatenate(found, axis=1) - np.stack([logits[-2:] for logits in expected])).max()
    assert error / expected[0].std() < TOLERANCE
    with pytest.raises(DynexportError, match="the context is exhausted"):
        generate(run, state, [token, token], keep)
