"""What holds for Mixture-of-Depths whatever the contract and the tokens: one tiny model under contracts made up."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from routed import CONTEXT, NEAR, Row, Talk, error, follow
from tiny_models import LAYERS, VOCABULARY, save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

# Of a row's standard deviation: float32 added up in another order.
SAME = 1e-4
# Kernels add up in an order that depends on the longest row of a batch.
ISOLATED = 1e-5
EVERYTHING = tuple(range(LAYERS))

quick = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
causal = st.fixed_dictionaries(
    {
        "routed_layers": st.sampled_from([[1, 3], [2], [0, 1, 2, 3]]),
        "router_input": st.sampled_from(["hidden", "normed"]),
        # Not the raw score in place of the layer: near 0 it would leave a norm nothing but rounding.
        "gate": st.sampled_from(["raw", "sigmoid", "none"]),
        "positions": st.sampled_from(["original", "compact"]),
        "decision": st.fixed_dictionaries(
            {
                "rule": st.sampled_from(["router", "predictor"]),
                "threshold": st.sampled_from([0.4, 0.5]),
                "comparison": st.sampled_from([">", ">="]),
            }
        ),
        "cache": st.fixed_dictionaries({"capacity": st.sampled_from([1.0, 0.2])}),
    }
)
contracts = causal | st.builds(
    lambda fields, capacity, rounding: {**fields, "prefill": "topk", "capacity": capacity, "rounding": rounding},
    causal,
    st.sampled_from([0.125, 0.4, 1.0]),
    st.sampled_from(["floor", "ceil"]),
)
token = st.integers(0, VOCABULARY - 1)


def prompts(rows: int, longest: int = 20) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(token, min_size=1, max_size=longest), min_size=rows, max_size=rows)


def generated(rows: int, steps: int = 3) -> st.SearchStrategy[list[list[int]]]:
    return st.lists(st.lists(token, min_size=steps, max_size=steps), min_size=rows, max_size=rows)


def talks(rows: int) -> st.SearchStrategy[Talk]:
    """A prompt, generated tokens, a second prompt, generated tokens."""
    parts = st.tuples(prompts(rows), generated(rows), prompts(rows, 6), generated(rows))
    return parts.map(Talk)


@dataclass(frozen=True)
class Models:
    """A checkpoint, and what has been made of it, by contract."""

    directory: Path
    bundles: Path

    def executor(self, fields: dict[str, Any], static: bool) -> Executor:
        return self._decoder(json.dumps(fields), static)

    def reference(self, fields: dict[str, Any]) -> ModReference:
        return self._reference(json.dumps(fields))

    @cache  # noqa: B019 - it lives as long as the module's tests
    def _decoder(self, fields: str, static: bool) -> Executor:
        bundle = self.bundles / str(len(list(self.bundles.iterdir())))
        convert(self.directory, bundle, fields=json.loads(fields), static=static, max_length=CONTEXT, golden=False)
        return Executor(Bundle.open(bundle), threads=1)

    @cache  # noqa: B019
    def _reference(self, fields: str) -> ModReference:
        checkpoint = open_checkpoint(self.directory)
        contract = parse_contract({**checkpoint.config["dynexport"], **json.loads(fields)}, "test")
        return ModReference.from_checkpoint(checkpoint, contract=contract, max_length=CONTEXT)


@pytest.fixture(scope="module")
def models(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    home = tmp_path_factory.mktemp("routed")
    save_routed_model(home / "model", saved_model("llama"))
    (home / "bundles").mkdir()
    return Models(home / "model", home / "bundles")


def same(found: Sequence[Row], expected: Sequence[Row], tolerance: float = SAME) -> None:
    """The same decisions and, but for rounding, the same logits."""
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.chosen, b.chosen)
        np.testing.assert_array_equal(a.overflow, b.overflow)
        np.testing.assert_allclose(a.scores, b.scores, atol=tolerance, rtol=tolerance)
        np.testing.assert_allclose(a.logits, b.logits, atol=tolerance * b.logits.std())


def clear(rows: Sequence[Row]) -> bool:
    """No decision is so near that rounding may change it."""
    return all(row.margins.min() > NEAR for row in rows)


@quick
@given(fields=contracts, talk=talks(3))
def test_both_lowerings_do_the_same(models: Models, fields: dict[str, Any], talk: Talk) -> None:
    static = follow(models.executor(fields, True), talk)
    assume(clear(static))
    same(follow(models.executor(fields, False), talk), static)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
@quick
@given(fields=causal, row=st.lists(token, min_size=2, max_size=24), chunk=st.integers(1, 8))
def test_a_prompt_is_as_many_single_steps_and_as_any_pieces(
    models: Models, static: bool, fields: dict[str, Any], row: list[int], chunk: int
) -> None:
    executor = models.executor(fields, static)
    whole = follow(executor, Talk(([row],)))
    assume(clear(whole))
    same(follow(executor, Talk(([row[:1]], [row[1:]]))), whole)
    same(follow(executor, Talk(([row],)), chunk=chunk), whole)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
@quick
@given(fields=contracts, talk=talks(4), other=talks(4))
def test_rows_know_nothing_of_each_other(
    models: Models, static: bool, fields: dict[str, Any], talk: Talk, other: Talk
) -> None:
    """Where no shape depends on a choice, to the last bit."""
    parts = tuple(
        [mine[0], *(row[: len(like)] + like[len(row) :] for row, like in zip(theirs[1:], mine[1:], strict=True))]
        for mine, theirs in zip(talk.parts, other.parts, strict=True)
    )
    executor = models.executor(fields, static)
    expected = follow(executor, talk)[:1]
    assume(clear(expected))
    found = follow(executor, Talk(parts))[:1]
    same(found, expected, ISOLATED)
    if static:
        np.testing.assert_array_equal(found[0].logits, expected[0].logits)
    same(follow(executor, talk.of_rows([0])), expected)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
@quick
@given(fields=causal, talk=talks(2), data=st.data())
def test_forced_decisions_are_made(
    models: Models, static: bool, fields: dict[str, Any], talk: Talk, data: st.DataObject
) -> None:
    """As far as the caches have room; and all that follows is what PyTorch makes of them."""
    executor, golden = models.executor(fields, static), models.reference(fields)
    layers = len(executor.manifest.routing.layers)
    (slots,) = {cache.most for cache in executor.manifest.caches if cache.place in executor.manifest.routing.layers}
    seed = data.draw(st.integers(0, 1000))
    generator, share = np.random.default_rng(seed), data.draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    forced = [generator.random((layers, len(row))) < share for row in talk.rows]
    expected = list(zip(*golden.routed_logits(talk.rows, talk.prompted, forced), strict=True))
    for row, found in enumerate(follow(executor, talk, forced=forced)):
        np.testing.assert_array_equal(found.chosen, forced[row] & (forced[row].cumsum(1) <= slots))
        assert error(found, golden, talk, row, expected[row]) < SAME


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_all_tokens_everywhere_without_a_gate_is_the_dense_model(
    models: Models, static: bool, positions: str, tmp_path: Path
) -> None:
    fields = {"routed_layers": [0, 1, 2, 3], "capacity": 1.0, "gate": "none", "positions": positions}
    talk = Talk.random((1, 7, 19), (4, 4, 4), (5, 2, 3), (2, 2, 2))
    convert(models.directory, tmp_path / "dense", strategy="dense", max_length=CONTEXT, golden=False)
    dense = Executor(Bundle.open(tmp_path / "dense"), threads=1)
    for decision in ({"rule": "always"}, {"threshold": 0.0}):
        executor = models.executor({**fields, "decision": decision}, static)
        for row in range(3):
            [found] = follow(executor, talk.of_rows([row]))
            assert found.chosen.all() and not found.overflow.any()
            state = dense.full_cache(1, CONTEXT)
            [expected] = dense.prefill(state, [talk.rows[row]], all_logits=True)
            np.testing.assert_allclose(found.logits, expected, atol=2e-5)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
def test_no_token_anywhere_leaves_the_other_layers(models: Models, static: bool, tmp_path: Path) -> None:
    talk = Talk.random((1, 7, 19), (4, 4, 4), (5, 2, 3), (2, 2, 2))
    rows = follow(models.executor({"decision": {"threshold": 1.0}}, static), talk)
    convert(models.directory, tmp_path / "skip", strategy="unified-skip", keep=[0, 2], max_length=CONTEXT, golden=False)
    skip = Executor(Bundle.open(tmp_path / "skip"), threads=1)
    keep = Depth(name="test", ratio=None, keep=(0, 2), prompt=(0, 1, 2, 3))
    for found, ids in zip(rows, talk.rows, strict=True):
        assert not found.chosen.any() and not found.overflow.any()
        state = skip.full_cache(1, CONTEXT)
        expected = np.concatenate([skip.step(state, [i], keep) for i in ids])
        np.testing.assert_allclose(found.logits, expected, atol=2e-5)


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
def test_a_token_decides_by_the_tokens_up_to_it_alone(models: Models, static: bool) -> None:
    """Whatever comes after it, its score is the same."""
    executor = models.executor({"routed_layers": [0, 1, 2, 3]}, static)
    [row] = Talk.random((30,)).rows
    [expected] = follow(executor, Talk(([row],)))
    for length in (1, 8, 17, 29):
        [other] = follow(executor, Talk(([row[:length] + [(t + 1) % VOCABULARY for t in row[length:]]],)))
        np.testing.assert_array_equal(other.chosen[:, :length], expected.chosen[:, :length])
        np.testing.assert_allclose(other.scores[:, :length], expected.scores[:, :length], atol=SAME)
