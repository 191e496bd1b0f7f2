"""Huginn behind the strategy loop: loops with the input injected, a random state by seed, exits by change of state.

Parity with an implementation that shares nothing with the project is in the conformance set (``huginn.py`` there).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import CONFORMANCE, dynexport

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.parity import verify
from dynexport.exporter.parity.cases import replay
from dynexport.exporter.reference import Case
from dynexport.exporter.reference.weights import Weights
from dynexport.exporter.strategies import declared_contract
from dynexport.exporter.strategies.loop.reference import LoopReference
from dynexport.runtime import Model
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import Loop
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.generation.speculation import Speculation

HUGINN = CONFORMANCE / "loop-huginn"
CONFIG = json.loads((HUGINN / "config.json").read_text())
HIDDEN, PRELUDE, CORE = CONFIG["n_embd"], CONFIG["n_layers_in_prelude"], CONFIG["n_layers_in_recurrent_block"]
# Float32 on both sides, added up in another order; every further loop amplifies it.
TOLERANCE = 5e-4
CHANGE = {"rule": "change", "threshold": 0.55}


def made(path: Path, **fields: Any) -> Executor:
    """An executor of the model with other fields in its contract."""
    convert(HUGINN, path, fields=fields, golden=False)
    return Executor(Bundle.open(path), threads=1)


def reference(executor: Executor) -> LoopReference:
    assert isinstance(executor.manifest.contract, Loop)
    return LoopReference(Weights(open_checkpoint(HUGINN), streaming=False), executor.manifest.contract)


def rows(*lengths: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(5)
    return [tuple(random.integers(0, 60, length).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    return made(tmp_path_factory.mktemp("three") / "b", loops=3)


def test_the_contract_that_its_fields_say() -> None:
    assert declared_contract(CONFIG) == {
        "strategy": "loop",
        "loops": 2,
        "body": (1, 2),
        "norm_between": False,
        "norm_after": True,
        "inject": "adapter",
    }


def test_every_number_of_loops_agrees_with_pytorch(three: Executor) -> None:
    """Two turns, and rows of two lengths together."""
    manifest, expected = three.manifest, reference(three)
    seen = []
    for depth in (manifest.full, *manifest.depths):
        for ids, prompted in ((rows(24), [((0, 9), (14, 20))]), (rows(14, 9), [((0, 10),), ((0, 5),)])):
            cases = [Case(row, given, depth) for row, given in zip(ids, prompted, strict=True)]
            there = [np.repeat(np.isin(range(manifest.model.layers), depth.keep)[:, None], len(r), 1) for r in ids]
            wanted = expected.logits(ids, there)
            seen.append(wanted[0][:5])
            for one, found in zip(wanted, replay(three, cases), strict=True):
                assert np.abs(one - found).max() < TOLERANCE, depth.name
    assert np.abs(seen[0] - seen[2]).max() > 0.1, "another number of loops is another model"


def test_fewer_loops_are_the_model_converted_with_fewer(three: Executor, tmp_path: Path) -> None:
    two = made(tmp_path / "two")
    found = []
    for executor, name in ((three, "loops-2"), (two, "full")):
        cache = executor.full_cache(1, 16)
        logits = executor.prefill(cache, [[3, 1, 4, 1, 5]], depth=executor.bundle.depth(name))
        found.append(np.concatenate([*logits, executor.step(cache, [9], executor.bundle.depth(name))]))
    assert (found[0] == found[1]).all()


def test_the_adapter_is_read_with_every_later_loop(three: Executor) -> None:
    """The half for the state once in each, but not with zeros; the half for the input once a step."""
    cost, half = three.manifest.cost, 4 * HIDDEN * HIDDEN
    first, second, third = (cost.layers[PRELUDE + loop * CORE] for loop in range(3))
    assert first + half == second == third
    assert cost.shared == half + 4 * HIDDEN * (1 + CONFIG["vocab_size"])  # with the tied head and the final norm


def test_a_random_state_by_its_seed(tmp_path: Path) -> None:
    ids, logits = rows(12), []
    for seed in (7, 8):
        executor = made(tmp_path / str(seed), state_seed=seed)
        (found,) = replay(executor, [Case(ids[0], ((0, 8),), executor.manifest.full)])
        assert np.abs(found - reference(executor).logits(ids)[0]).max() < TOLERANCE
        logits.append(found)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3
    states = Loop(loops=2, state_seed=7).start_state(20_000)
    assert np.abs(states).max() < 3 * 0.4**0.5 and states.std() == pytest.approx(0.4**0.5, rel=0.03)
    assert (states == Loop(loops=9, state_seed=7).start_state(20_000)).all()
    assert not Loop(loops=2).start_state(9).any()


@pytest.mark.parametrize("kept", ["compute", "last"])
def test_exits_by_change_do_not_depend_on_batch_or_pieces(kept: str, tmp_path: Path) -> None:
    """Prompts in a batch, and single steps, decide as PyTorch does for each row alone."""
    executor = made(tmp_path / "b", loops=4, exit=CHANGE, exited_kv=kept)
    expected, ids = reference(executor), rows(13, 9)
    together = executor.full_cache(2, 32, record=True)
    logits = executor.prefill(together, ids)
    loops = []
    for row, tokens in enumerate(ids):
        wanted, (routes,) = expected.routed_logits([tokens], None)
        assert np.abs(wanted[0][-1] - logits[row]).max() < TOLERANCE
        assert (executor.reader.joined(together.logs[row]).choices == routes.chosen).all()
        alone = executor.full_cache(1, 32, record=True)
        executor.prefill(alone, [tokens[:4]])
        found = [executor.step(alone, [token], executor.manifest.full) for token in tokens[4:]][-1]
        assert np.abs(found[0] - logits[row]).max() < TOLERANCE
        assert (executor.reader.joined(alone.logs[0]).choices == routes.chosen).all()
        loops += routes.chosen.sum(axis=0).tolist()
    assert len({*loops}) > 1, "tokens leave after different loops"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loops": 0}, "contract: loop.loops: Input should be greater than or equal to 1, found 0"),
        ({"inject": "none"}, "inject: expected adapter for huginn_raven, found none"),
        ({"body": [1, 3]}, "norm_after: expected layers after the body, found none"),
        ({"state_seed": -1}, "contract: loop.state_seed: Input should be greater than or equal to 0, found -1"),
        ({"exit": {"rule": "kl"}}, "exit.rule: Input should be 'none', 'hazard' or 'change', found 'kl'"),
        ({"exit": {"rule": "change"}}, "exit.threshold: expected a number with the rule change, such as 0.03, found"),
        ({"exit": CHANGE, "exited_kv": "absent"}, "exited_kv: expected compute or last, found absent"),
        ({"exit": {"rule": "hazard"}}, "tensor model.early_exit_gate.weight"),
    ],
)
def test_what_it_cannot_do_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DynexportError) as error:
        convert(HUGINN, tmp_path / "b", fields=fields, golden=False)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layers": 5}, "n_layers: expected 1 + 2 + 1, the sum of n_layers_in_prelude"),
        ({"n_heads": 8}, "n_embd: expected an even number of channels for each of 8 heads, found 24"),
        ({"mean_recurrence": 0}, "mean_recurrence: expected an integer from 1"),
        ({"test_time_noise": 0.1}, "test_time_noise: expected 0"),
        ({"injection_type": "add"}, "injection_type: expected 'linear'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads: expected 3"),
        ({"dynexport": {"strategy": "dense"}}, "strategy: expected the one that a huginn_raven declares"),
    ],
)
def test_configs_of_other_models_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    shutil.copytree(HUGINN, tmp_path / "model")
    (tmp_path / "model/config.json").write_text(json.dumps(CONFIG | fields))
    with pytest.raises(DynexportError) as error:
        convert(tmp_path / "model", tmp_path / "b", golden=False)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_inject_needs_a_family_with_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(DynexportError, match=r"^inject: expected none for ouro, found adapter$"):
        convert(CONFORMANCE / "loop-ouro", tmp_path / "b", fields={"inject": "adapter"}, golden=False)
    with pytest.raises(DynexportError, match=r"^state_seed: expected with an adapter, found 3 without one$"):
        convert(CONFORMANCE / "loop-ouro", tmp_path / "b", fields={"state_seed": 3}, golden=False)


def test_verify_with_int4_weights_and_plugins(tmp_path: Path) -> None:
    """PyTorch has the weights as they were rounded, also those of the halves of the adapter."""
    convert(HUGINN, tmp_path / "b", precision="int4", plugins=True)
    report = verify(tmp_path / "b", HUGINN, threads=1, new_tokens=2)
    assert report.passed, [check for check in report.checks if not check.passed]


def test_exits_with_float16_caches_copy_entries(tmp_path: Path) -> None:
    convert(CONFORMANCE / "loop-huginn-change", tmp_path / "b", plugins=True, kv_cache_dtype="fp16", golden=False)
    executor = Executor(Bundle.open(tmp_path / "b"), threads=1)
    cache, expected = executor.full_cache(1, 32, record=True), reference(executor)
    logits, ids = executor.prefill(cache, [[60, 7, 7, 0, 33]]), [60, 7, 7, 0, 33]
    for token in (12, 50, 21, 8, 44):
        logits, ids = executor.step(cache, [token], executor.manifest.full), [*ids, token]
    assert np.abs(expected.logits([ids])[0][-1] - logits[0]).max() < 0.02, "entries are rounded"
    left = executor.reader.joined(cache.logs[0]).choices.sum(axis=0)
    assert left.min() < 3
    for token, loops in enumerate(left):
        later = [cache.buffers[f"{PRELUDE + CORE * loop}.key"][0, :, token] for loop in range(loops, 4)]
        assert all((entry == later[0]).all() for entry in later)


def test_speculation_drafts_with_fewer_loops(three: Executor) -> None:
    """Their keys and values are a prefix of the full model's, and the tokens are the same."""
    model, how = Model(three.bundle, threads=1), {"max_new_tokens": 12, "depth": "full"}
    drafts = Speculation(3, three.bundle.depth("loops-2"))
    prompts = [[3, 1, 4, 1, 5], [7, 8]]
    assert model.generate(prompts, **how) == model.generate(prompts, **how, speculation=drafts)


def test_loops_on_the_command_line(tmp_path: Path) -> None:
    done = dynexport("convert", HUGINN, "--loops", "3", "--no-golden", "-o", tmp_path / "b")
    assert done.code == 0 and "injected" in done.out
    assert "loops: 3 are more than the 2 that the checkpoint declares; expect worse text" in done.err
    told = []
    for how in (["--loops", "2"], ["--depth", "loops-2"]):
        ran = dynexport("run", str(tmp_path / "b"), "--ids", "1,2,3", "--max-new-tokens", "3", *how)
        assert ran.code == 0 and "fewer loops than the checkpoint was trained for" in ran.err
        told.append(ran.out)
    assert told[0] == told[1]
    for how, message in (
        (["--loops", "0"], "'--loops': 0 is not in the range"),
        (["--loops", "9"], "depth: expected 1, loops-1, loops-2; found loops-9"),
        (["--loops", "2", "--depth", "loops-1"], "--loops: expected without --depth, found 2 beside loops-1"),
    ):
        ran = dynexport("run", str(tmp_path / "b"), "--ids", "1", *how)
        assert ran.code != 0 and message in ran.err and ran.err.count("\n") == 1
