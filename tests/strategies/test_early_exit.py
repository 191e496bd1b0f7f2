"""Early exit: its depths, its graphs, and parity with PyTorch wherever prompts run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE
from rows_together import assert_as_alone

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.exporter.parity.cases import replay
from dynexport.exporter.reference import Case
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import EarlyExit, parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.executor import Executor

sys.path.insert(0, str(CONFORMANCE))
import early_exit

LAYERS = 4  # of the tiny models
EXITS = (1, 3)
FORMS: tuple[dict[str, Any], ...] = ({}, {"static": True}, {"target": "tensorrt"})


def contract(**fields: Any) -> EarlyExit:
    found = parse_contract({"strategy": "early-exit", **fields}, "config.json: dynexport")
    assert isinstance(found, EarlyExit)
    return found


def depths(layers: int, **fields: Any) -> tuple[Depth, ...]:
    return strategies()["early-exit"].depths(contract(**fields), layers)


def bundle_of(model: Path, path: Path, prompt: str, **options: Any) -> Bundle:
    fields = {"exits": list(EXITS), "prompt": prompt}
    convert(model, path, strategy="early-exit", fields=fields, golden=False, **options)
    return Bundle.open(path)


def test_depths() -> None:
    everything = tuple(range(8))
    assert [(d.name, d.ratio, d.keep, d.prompt) for d in depths(8, exits=[2, 5])] == [
        ("exit-2", 4.0, (0, 1), everything),
        ("exit-5", 1.6, (0, 1, 2, 3, 4), everything),
    ]
    assert [depth.prompt for depth in depths(8, exits=[2, 7], prompt="exit")] == [(0, 1), everything[:7]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "early-exit.exits: Field required"),
        ({"exits": []}, "early-exit.exits: Tuple should have at least 1 item"),
        ({"exits": [0, 2]}, "early-exit.exits: expected ascending numbers of layers from 1, found [0, 2]"),
        ({"exits": [3, 2]}, "early-exit.exits: expected ascending numbers of layers from 1, found [3, 2]"),
        ({"exits": [2, 2]}, "early-exit.exits: expected ascending numbers of layers from 1, found [2, 2]"),
        ({"exits": [2.5]}, "early-exit.exits.0: "),
        ({"exits": [True]}, "early-exit.exits.0: "),
        ({"exits": list(range(1, 70))}, "early-exit.exits: Tuple should have at most 64 items"),
        ({"exits": [2, 4]}, "exits: expected 1..3 of 4 layers, found 4"),
        ({"exits": [2], "prompt": "half"}, "early-exit.prompt: "),
        ({"exits": [2], "speedups": [2]}, "early-exit.speedups: "),
    ],
)
def test_what_no_model_can_do_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DynexportError) as error:
        depths(4, **fields)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_conversion_without_exits_says_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"exits: expected after how many layers .*--set 'exits=\[4\]'"):
        convert(CONFORMANCE / "dense", tmp_path / "b", strategy="early-exit")


def test_which_exits_were_trained() -> None:
    strategy, full, left = strategies()["early-exit"], contract(exits=[2]), contract(exits=[2], prompt="exit")
    first, second = depths(8, exits=[2, 4])
    assert strategy.is_trained(full, first, contract(exits=[2]))
    assert not strategy.is_trained(full, second, contract(exits=[2]))
    assert not strategy.is_trained(left, first, contract(exits=[2]))
    other = parse_contract({"strategy": "unified-skip", "keep": [0, 1]}, "config.json: dynexport")
    assert not strategy.is_trained(full, first, other)


@pytest.mark.parametrize("prompt", ["full", "exit"])
def test_graphs_of_a_bundle(prompt: str, saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    one = bundle_of(saved_model("mistral"), tmp_path / "one", prompt).manifest
    assert [(p.phase, p.depth, p.graph) for p in one.programs] == [("prompt", None, "model"), ("decode", None, "model")]
    with_positions = {cache.place for cache in one.caches if "position" in cache.parts}
    assert with_positions == {1, 2, 3}  # layer 0 runs every token, whatever its depth
    many = bundle_of(saved_model("mistral"), tmp_path / "many", prompt, target="tensorrt").manifest
    graphs = {graph.name: graph.layers for graph in many.graphs}
    assert graphs == {"model": (0, 1, 2, 3), "exit-1": (0,), "exit-3": (0, 1, 2)}
    for depth in many.depths:
        assert many.program("decode", depth).graph == depth.name
        assert many.program("prompt", depth).graph == (depth.name if prompt == "exit" else "model")
        profiles = ["prefill", "decode"] if prompt == "exit" else ["decode"]
        assert [profile.name for profile in many.graph(depth.name).profiles] == profiles


@pytest.mark.parametrize("prompt", ["full", "exit"])
@pytest.mark.parametrize("family", ["mistral", "bloom", "gemma2"])
def test_random_weights_agree_with_pytorch(
    family: str, prompt: str, saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Two turns, at lengths beyond the window; and rows of two lengths together."""
    from dynexport.exporter.reference.hugging_face import Reference

    model, random = saved_model(family), np.random.default_rng(5)
    reference = Reference.from_checkpoint(open_checkpoint(model))
    vocabulary = min(90, json.loads((model / "config.json").read_text())["vocab_size"])
    ids = [tuple(random.integers(0, vocabulary, length).tolist()) for length in (30, 14, 9)]
    batches = [([ids[0]], [((0, 11), (17, 24))]), (ids[1:], [((0, 10),), ((0, 5),)])]
    for form in FORMS:
        bundle = bundle_of(model, tmp_path / str(len(list(tmp_path.iterdir()))), prompt, **form)
        executor = Executor(bundle, threads=1)
        for depth, after in [(bundle.manifest.full, LAYERS), *zip(bundle.manifest.depths, EXITS, strict=True)]:
            for rows, prompted in batches:
                cases = [Case(row, given, depth) for row, given in zip(rows, prompted, strict=True)]
                expected = reference.logits(rows, [runs(case, after, prompt) for case in cases])
                for wanted, found in zip(expected, replay(executor, cases), strict=True):
                    assert np.abs(wanted - found).max() < 1e-4, (form, depth.name)


def runs(case: Case, after: int, prompt: str) -> np.ndarray:
    """Which tokens run in which layer, by the routing contract's sentence."""
    given = {place for start, stop in case.prompted for place in range(start, stop)}
    everywhere = given if prompt == "full" else set()
    return np.array([[i < after or place in everywhere for place in range(len(case.tokens))] for i in range(LAYERS)])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_one_batch_at_depths_of_their_own(
    form: dict[str, Any], saved_model: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = bundle_of(saved_model("mistral"), tmp_path / "b", "exit", **form)
    assert_as_alone(bundle, ["exit-3", "full", "exit-1"], 90)


@pytest.mark.parametrize("form", [{}, {"target": "tensorrt"}], ids=str)
@pytest.mark.parametrize("prompt", ["full", "exit"])
def test_verify(prompt: str, form: dict[str, Any], tmp_path: Path) -> None:
    model = CONFORMANCE / f"early-exit-prompt-{prompt}"
    convert(model, tmp_path / "b", fields={"exits": [2, 4]}, **form)
    bundle = Bundle.open(tmp_path / "b")
    assert [depth.trained for depth in bundle.manifest.depths] == [True, False]
    for against in (model, None):
        report = verify(bundle, against, threads=1, new_tokens=4)
        assert report.passed, [check for check in report.checks if not check.passed]
    told = {check.name for check in report.checks}
    assert {"golden/exit-2/33", "golden/exit-4/33", "ratio_change/exit-4"} <= told


@pytest.mark.parametrize("prompt", ["full", "exit"])
def test_the_answers_are_those_of_the_script(prompt: str) -> None:
    said = json.loads((CONFORMANCE / f"early-exit-prompt-{prompt}" / "expected.json").read_text())
    made = early_exit.expected(prompt)
    assert [run["greedy"] for run in made["runs"]] == [run["greedy"] for run in said["runs"]]
    for ours, theirs in zip(made["runs"], said["runs"], strict=True):
        np.testing.assert_allclose(ours["last_prompt_logits"], theirs["last_prompt_logits"], atol=2e-6)
