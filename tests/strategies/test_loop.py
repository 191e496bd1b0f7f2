"""Looped models: their depths, one copy of the weights, and parity with PyTorch loop by loop."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import CONFORMANCE
from rows_together import assert_as_alone
from safetensors.numpy import load_file, save_file

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.exporter.parity.cases import replay
from dynexport.exporter.reference import Case
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import declared_contract, strategies
from dynexport.exporter.strategies.loop.order import Order
from dynexport.exporter.strategies.loop.reference import LoopReference
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Loop, parse_contract
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import WEIGHTS
from dynexport.runtime.execution.executor import Executor

sys.path.insert(0, str(CONFORMANCE))
import loop

FORMS: tuple[dict[str, Any], ...] = ({}, {"static": True}, {"target": "tensorrt"})
OURO = CONFORMANCE / "loop-ouro"
# Float32 on both sides, added up in another order; every further loop amplifies it (1.1e-4 with three).
TOLERANCE = 5e-4
# Names of cases and the fields that their contracts have.
FIELDS = {"loop-ouro": {"loops": 3}, "loop-body": {"loops": 3, "body": [1, 1], "norm_between": False}}


def contract(**fields: Any) -> Loop:
    found = parse_contract({"strategy": "loop", **fields}, "config.json: dynexport")
    assert isinstance(found, Loop)
    return found


def test_order_of_layers() -> None:
    order = Order.of(contract(loops=3, body=[1, 2]), 4)
    assert order.layers == (0, 1, 2, 1, 2, 1, 2, 3)
    assert [list(order.loop(number)) for number in range(3)] == [[1, 2], [3, 4], [5, 6]]
    assert order.with_loops(1) == (0, 1, 2, 7)
    assert order.with_loops(3) == tuple(range(8))


def test_depths() -> None:
    found = strategies()["loop"].depths(contract(loops=3), 12)
    assert [(d.name, d.ratio, d.keep, d.prompt) for d in found] == [
        ("loops-1", 3.0, (0, 1, 2, 3), (0, 1, 2, 3)),
        ("loops-2", 1.5, tuple(range(8)), tuple(range(8))),
    ]


@pytest.mark.parametrize(
    ("fields", "contract"),
    [
        ({}, {"strategy": "loop", "loops": 2}),
        ({"total_ut_steps": 1}, None),
        ({"early_exit_step": 0}, None),
        ({"total_ut_steps": 4, "early_exit_step": 2}, {"strategy": "loop", "loops": 3}),
        ({"early_exit_step": 7}, {"strategy": "loop", "loops": 2}),
        ({"early_exit_threshold": None}, {"strategy": "loop", "loops": 2}),
        (
            {"early_exit_threshold": 0.25},
            {"strategy": "loop", "loops": 2, "exit": {"rule": "hazard", "threshold": 0.25}},
        ),
        ({"early_exit_threshold": 0.25, "early_exit_step": 1}, {"strategy": "loop", "loops": 2}),
        ({"dynexport": {"strategy": "dense"}}, {"strategy": "dense"}),
    ],
)
def test_the_contract_that_ouros_fields_say(fields: dict[str, Any], contract: dict[str, Any] | None) -> None:
    assert declared_contract({**json.loads((OURO / "config.json").read_text()), **fields}) == contract


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loops": 0}, "contract: loop.loops: Input should be greater than or equal to 1, found 0"),
        ({"loops": 10**9}, "contract: loop.loops: Input should be less than or equal to 64, found 1000000000"),
        ({"body": [1, 3]}, "body: expected layers 0..2, found 3"),
        ({"exit": {"rule": "entropy"}}, "contract: loop.exit.rule: Input should be 'none', 'hazard' or 'change'"),
        ({"speedups": [2]}, "contract: loop.speedups: "),
    ],
)
def test_what_no_model_can_do_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError) as error:
        convert(OURO, tmp_path / "b", fields=fields, golden=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", 1 << 40])
def test_a_config_with_no_number_of_loops_is_refused(value: Any, tmp_path: Path) -> None:
    shutil.copytree(OURO, tmp_path / "model")
    config = json.loads((OURO / "config.json").read_text()) | {"total_ut_steps": value}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.raises(DynexportError, match=r"total_ut_steps: expected|loop.loops: Input should be less than"):
        convert(tmp_path / "model", tmp_path / "b", golden=False)


def test_a_conversion_without_loops_says_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"loops: expected how often .*--set loops=4"):
        convert(CONFORMANCE / "dense", tmp_path / "b", strategy="loop")


def test_more_loops_than_trained_are_told(tmp_path: Path) -> None:
    made = convert(OURO, tmp_path / "b", fields={"loops": 3}, golden=False)
    assert "loops: 3 are more than the 2 that the checkpoint declares; expect worse text" in made.notes
    assert not any("loops:" in note for note in convert(OURO, tmp_path / "b", golden=False).notes)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_stored_once(form: dict[str, Any], tmp_path: Path) -> None:
    sizes = {}
    for loops in (1, 4):
        made = convert(OURO, tmp_path / str(loops), fields={"loops": loops}, golden=False, **form).manifest
        sizes[loops] = made.files[WEIGHTS].bytes
    assert sizes[1] == sizes[4]
    assert made.model.layers == len(made.caches) == 4 * loop.LAYERS
    assert made.cost.layers == made.cost.layers[: loop.LAYERS] * 4
    graph = onnx.load(tmp_path / "4/model.onnx", load_external_data=False).graph
    names = [tensor.name for tensor in graph.initializer if tensor.name.startswith("model.layers.")]
    assert {int(name.split(".")[2]) for name in names} == set(range(loop.LAYERS))


@pytest.mark.parametrize("case", FIELDS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_number_of_loops_agrees_with_pytorch(case: str, form: dict[str, Any], tmp_path: Path) -> None:
    """Two turns, and rows of two lengths together."""
    reference = LoopReference(Weights(open_checkpoint(CONFORMANCE / case), streaming=False), contract(**FIELDS[case]))
    random = np.random.default_rng(5)
    ids = [tuple(random.integers(0, 60, length).tolist()) for length in (30, 14, 9)]
    batches = [([ids[0]], [((0, 11), (17, 24))]), (ids[1:], [((0, 10),), ((0, 5),)])]
    convert(CONFORMANCE / case, tmp_path / "b", strategy="loop", fields=FIELDS[case], golden=False, **form)
    executor = Executor(Bundle.open(tmp_path / "b"), threads=1)
    manifest = executor.manifest
    seen = []
    for depth in (manifest.full, *manifest.depths):
        for rows, prompted in batches:
            cases = [Case(row, given, depth) for row, given in zip(rows, prompted, strict=True)]
            there = [np.repeat(np.isin(range(manifest.model.layers), depth.keep)[:, None], len(r), 1) for r in rows]
            expected = reference.logits(rows, there)
            seen.append(expected[0][:5])
            for wanted, found in zip(expected, replay(executor, cases), strict=True):
                assert np.abs(wanted - found).max() < TOLERANCE, depth.name
    assert np.abs(seen[0] - seen[2]).max() > 0.1, "another number of loops is another model"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_one_batch_at_depths_of_their_own(form: dict[str, Any], tmp_path: Path) -> None:
    convert(OURO, tmp_path / "b", fields={"loops": 3}, golden=False, **form)
    assert_as_alone(Bundle.open(tmp_path / "b"), ["loops-2", "full", "loops-1"], 60)


def test_fewer_loops_are_the_model_converted_with_fewer(tmp_path: Path) -> None:
    """What is said of fewer loops: they are exact, for a later loop changes nothing before it."""
    convert(OURO, tmp_path / "three", fields={"loops": 3}, golden=False)
    convert(OURO, tmp_path / "two", fields={"loops": 2}, golden=False)
    found = []
    for name, depth in (("three", "loops-2"), ("two", "full")):
        bundle = Bundle.open(tmp_path / name)
        executor = Executor(bundle, threads=1)
        cache = executor.full_cache(1, 16)
        logits = executor.prefill(cache, [[3, 1, 4, 1, 5]], depth=bundle.depth(depth))
        found.append(np.concatenate([*logits, executor.step(cache, [9], bundle.depth(depth))]))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(
    "how", [{}, {"precision": "int4"}, {"target": "tensorrt"}, {"kv_cache_dtype": "int8"}], ids=str
)
def test_verify(how: dict[str, Any], saved_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = saved_model("ouro")
    if "kv_cache_dtype" in how:
        how = {**how, "kv_cache_text": np.random.default_rng(1).integers(0, 90, 300).tolist()}
    convert(model, tmp_path / "b", strategy="loop", fields={"loops": 2}, **how)
    bundle = Bundle.open(tmp_path / "b")
    for against in (model, None):
        report = verify(bundle, against, threads=1, new_tokens=4)
        assert report.passed, [check for check in report.checks if not check.passed]
    assert any(check.name.startswith("ratio_change/loops-1") for check in report.checks)


EXITS = {
    "compute": {"exit": {"rule": "hazard", "threshold": 0.6}},
    "last": {"exit": {"rule": "hazard", "threshold": 0.6}, "exited_kv": "last"},
}


@pytest.mark.parametrize("kept", EXITS)
def test_exits_are_verified(kept: str, tmp_path: Path) -> None:
    model = CONFORMANCE / f"loop-exit-{kept}"
    convert(model, tmp_path / "b")
    for against in (model, None):
        report = verify(tmp_path / "b", against, threads=1, new_tokens=4)
        assert report.passed, [check for check in report.checks if not check.passed]


@pytest.mark.parametrize("kept", EXITS)
def test_exits_do_not_depend_on_batch_or_pieces(kept: str, tmp_path: Path) -> None:
    """Rows of a batch leave after different loops; single steps, pieces and rows of their own decide the same."""
    convert(OURO, tmp_path / "b", fields={"loops": 4, **EXITS[kept]}, golden=False)
    executor = Executor(Bundle.open(tmp_path / "b"), threads=1)
    rows = [np.random.default_rng(9).integers(0, 60, length).tolist() for length in (17, 9, 12)]
    together = executor.full_cache(3, 32, record=True)
    logits = executor.prefill(together, rows)
    steps = [executor.step(together, [5, 6, 7], executor.manifest.full) for _ in range(3)]
    loops = [executor.reader.joined(together.logs[row]).choices.sum(axis=0) for row in range(3)]
    assert len({*np.concatenate(loops).tolist()}) > 2, "tokens leave after different loops"
    for row, ids in enumerate(rows):
        alone = executor.full_cache(1, 32, record=True)
        executor.prefill(alone, [ids[:4]])
        found = [executor.step(alone, [token], executor.manifest.full) for token in ids[4:]][-1]
        assert np.abs(found[0] - logits[row]).max() < TOLERANCE
        for token, both in zip([5 + row] * 3, steps, strict=True):
            assert np.abs(executor.step(alone, [token], executor.manifest.full)[0] - both[row]).max() < TOLERANCE
        assert executor.reader.joined(alone.logs[0]).choices.sum(axis=0).tolist() == loops[row].tolist()
        assert (alone.lengths == len(ids) + 3).all(), "every run has an entry of every token"


@pytest.mark.parametrize("kept", EXITS)
def test_forced_exits(kept: str, tmp_path: Path) -> None:
    """Tokens that are told how many loops to run; all of them make the model of that many loops."""
    convert(OURO, tmp_path / "b", fields={"loops": 3, **EXITS[kept]}, golden=False)
    convert(OURO, tmp_path / "fixed", fields={"loops": 3}, golden=False)
    exits, fixed = (Executor(Bundle.open(tmp_path / name), threads=1) for name in ("b", "fixed"))
    ids = list(range(3, 15))
    for loops, depth in ((1, "loops-1"), (2, "loops-2"), (3, "full")):
        told = np.repeat((np.arange(1, 3) < loops).astype(np.int64)[:, None], len(ids), axis=1)
        case = Case(tuple(ids), ((0, 8),), exits.manifest.full, told)
        expected = replay(fixed, [Case(tuple(ids), ((0, 8),), fixed.bundle.depth(depth))])[0]
        assert np.abs(replay(exits, [case])[0] - expected).max() < TOLERANCE


def test_exited_tokens_have_copies_in_later_loops(tmp_path: Path) -> None:
    convert(CONFORMANCE / "loop-exit-last", tmp_path / "b", golden=False)
    executor = Executor(Bundle.open(tmp_path / "b"), threads=1)
    cache = executor.full_cache(1, 32, record=True)
    executor.prefill(cache, [[3, 1, 4, 1, 5]])
    for token in (9, 2, 6):
        executor.step(cache, [token], executor.manifest.full)
    decisions = executor.reader.joined(cache.logs[0])
    runs = decisions.ran.sum(axis=0)
    assert {*runs.tolist()} <= {3, 5, 7} and runs.min() < 7
    for token, loops in enumerate(decisions.choices.sum(axis=0)):
        for place in range(2):  # of the body
            later = [cache.buffers[f"{place + 2 * loop}.key"][0, :, token] for loop in range(loops, 3)]
            assert all((entry == later[0]).all() for entry in later), "later loops have copies of the last"


@pytest.mark.parametrize(
    ("fields", "how", "message"),
    [
        ({"loops": 3, "exited_kv": "last"}, {}, "exited_kv: expected with an exit rule, found last without one"),
        ({"loops": 1, "exit": EXITS["last"]["exit"]}, {}, "exit: expected at least 2 loops to exit from, found 1"),
        ({**EXITS["last"], "exited_kv": "absent"}, {}, "exited_kv: expected compute or last, found absent"),
        (EXITS["last"], {"target": "tensorrt"}, "exited_kv: expected compute for TensorRT"),
        (EXITS["last"], {"static": True}, "--static: expected with exited_kv compute, found last"),
        (
            EXITS["last"],
            {"kv_cache_dtype": "int8"},
            "expected auto with the strategy loop, whose later",
        ),
    ],
)
def test_exits_that_no_graph_has_are_refused(
    fields: dict[str, Any], how: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DynexportError) as error:
        convert(OURO, tmp_path / "b", fields=fields, golden=False, **how)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_gate_of_another_shape_is_refused(tensor: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(CONFORMANCE / "loop-exit-last", model)
    tensors = load_file(model / "model.safetensors")
    tensors[f"model.early_exit_gate.{tensor}"] = np.ones((2, 3), np.float32)
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(DynexportError, match=rf"early_exit_gate.{tensor}: expected shape .* found \[2, 3\]"):
        convert(model, tmp_path / "b", golden=False)


@pytest.mark.parametrize("case", loop.KINDS)
def test_the_answers_are_those_of_the_script(case: str) -> None:
    said, made = json.loads((CONFORMANCE / case / "expected.json").read_text()), loop.expected(case)
    assert [run["greedy"] for run in made["runs"]] == [run["greedy"] for run in said["runs"]]
    assert [run["routes"] for run in made["runs"]] == [run["routes"] for run in said["runs"]]
    for ours, theirs in zip(made["runs"], said["runs"], strict=True):
        np.testing.assert_allclose(ours["last_prompt_logits"], theirs["last_prompt_logits"], atol=2e-6)
