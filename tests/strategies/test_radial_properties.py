"""What holds for a Radial Network whatever the tokens: thousands of paths, rows beside others, prompts cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, random_rows, save_radial_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies.radial.reference import RadialReference
from dynexport.runtime import Bundle
from dynexport.runtime.bundle.contract import Radial
from dynexport.runtime.execution.decisions import DecisionReader
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

pytest.importorskip("transformers")

ROWS, TOKENS, STEPS = 40, 48, 16
NEAR = 1e-5
# Of the logits' spread: float32 added up in another order.
SAME = 1e-4
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["step", "layer"])
def converted(
    request: pytest.FixtureRequest, saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Executor]:
    home = tmp_path_factory.mktemp(f"radial-{request.param}")
    model = save_radial_model(home / "model", saved_model("llama"), cache_policy=request.param)
    convert(model, home / "bundle", golden=False)
    return model, Executor(Bundle.open(home / "bundle"), 1)


def fed(
    executor: Executor, rows: list[list[int]], prompt: int, *, chunk: int = 1024
) -> tuple[list[np.ndarray], KvCache]:
    """Logits after every token: a prompt of so many tokens, the rest one by one."""
    cache = executor.full_cache(len(rows), len(rows[0]), record=True)
    found = executor.prefill(cache, [row[:prompt] for row in rows], all_logits=True, chunk=chunk)
    full = executor.bundle.depth(1)
    later = [executor.step(cache, [row[place] for row in rows], full) for place in range(prompt, len(rows[0]))]
    return [np.concatenate([logits, *(step[i : i + 1] for step in later)]) for i, logits in enumerate(found)], cache


def paths(cache: KvCache) -> list[np.ndarray]:
    """int64 [max_steps, tokens] of every row."""
    reader = DecisionReader(cache.manifest)
    return [reader.joined(log).choices for log in cache.logs or ()]


def test_thousands_of_tokens_take_the_paths_of_pytorch(converted: tuple[Path, Executor]) -> None:
    model, executor = converted
    rows = random_rows(*[TOKENS + STEPS] * ROWS, seed=3)
    found, cache = fed(executor, rows, TOKENS)
    contract = executor.manifest.contract
    assert isinstance(contract, Radial)
    reference = RadialReference.from_checkpoint(open_checkpoint(model), contract=contract)
    expected, told = reference.routed_logits(rows)
    clear = 0
    for ours, theirs in zip(paths(cache), told, strict=True):
        near = theirs.margin.min(axis=0) < NEAR
        assert ((ours == theirs.path).all(axis=0) | near).all()
        clear += int((~near).sum())
    assert clear >= 2000 and len({tuple(column) for path in paths(cache) for column in path.T}) > 20
    again = executor.prefill(
        executor.full_cache(ROWS, TOKENS + STEPS), rows, all_logits=True, forced=[path.decisions for path in told]
    )
    for row, other, logits in zip(found, again, expected, strict=True):
        assert np.abs(other - logits).max() < 1e-3
        if not np.abs(row - logits).max() < SAME * logits.std():
            pytest.fail("a row departs where no decision was near")


@quick
@given(data=st.data())
def test_a_row_beside_others_is_the_row_alone(converted: tuple[Path, Executor], data: st.DataObject) -> None:
    _, executor = converted
    token = st.integers(0, VOCABULARY - 1)
    length = data.draw(st.integers(2, 12))
    rows = data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=2, max_size=4))
    prompt = data.draw(st.integers(1, length))
    together, cache = fed(executor, rows, prompt)
    for row, logits, path in zip(rows, together, paths(cache), strict=True):
        alone, own = fed(executor, [row], prompt)
        np.testing.assert_array_equal(path, paths(own)[0])
        np.testing.assert_array_equal(logits, alone[0])


@quick
@given(data=st.data())
def test_a_prompt_cut_anywhere_is_the_prompt(converted: tuple[Path, Executor], data: st.DataObject) -> None:
    _, executor = converted
    row = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=2, max_size=24))
    whole, cache = fed(executor, [row], len(row))
    for prompt, chunk in ((1, 1), (len(row), data.draw(st.integers(1, len(row))))):
        cut, other = fed(executor, [row], prompt, chunk=chunk)
        np.testing.assert_array_equal(paths(cache)[0], paths(other)[0])
        np.testing.assert_allclose(cut[0], whole[0], atol=SAME * whole[0].std())
