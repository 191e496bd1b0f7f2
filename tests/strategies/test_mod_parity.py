"""Mixture-of-Depths of every family, in both lowerings, against PyTorch: decisions exactly, logits closely."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from routed import CONTEXT, NEAR, Talk, compare, finished
from tiny_models import EXEMPLARS, random_rows, save_routed_model

from dynexport.exporter.bundle.conversion import convert
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.reference import RowRoutes
from dynexport.exporter.strategies.mod.reference import ModReference
from dynexport.plugins.cpu_library import VARIABLE
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import parse_contract
from dynexport.runtime.execution.executor import Executor

pytest.importorskip("transformers")

# float32 on both sides, added up in another order: at most 4.2e-5 is measured.
# Every value of every field, and most pairs of values. Raw gates that replace are kept from 0, which a norm would
# divide by.
CONTRACTS: dict[str, dict[str, Any]] = {
    "plain": {"routed_layers": [1, 3]},
    "predictor-normed-sigmoid-replace-compact": {
        "routed_layers": [0, 2],
        "router_input": "normed",
        "gate": "sigmoid",
        "combine": "replace",
        "decision": {"rule": "predictor"},
        "positions": "compact",
    },
    "topk-overflow": {"capacity": 0.4, "rounding": "ceil", "prefill": "topk", "cache": {"capacity": 0.25}},
    "always-ungated-overflow-compact": {
        "gate": "none",
        "decision": {"rule": "always"},
        "positions": "compact",
        "cache": {"capacity": 0.3},
    },
    "topk-everywhere-predictor-compact": {
        "routed_layers": [0, 1, 2, 3],
        "capacity": 0.3,
        "router_input": "normed",
        "gate": "sigmoid",
        "decision": {"rule": "predictor", "comparison": ">="},
        "prefill": "topk",
        "positions": "compact",
    },
    "everywhere-ungated-normed-overflow": {
        "routed_layers": [0, 1, 2, 3],
        "router_input": "normed",
        "gate": "none",
        "cache": {"capacity": 0.2},
    },
    "replace-thresholds": {"combine": "replace", "decision": {"threshold": 0.55}, "thresholds": {"1": 0.6}},
    "topk-predictor-overflow": {
        "routed_layers": [1, 2],
        "capacity": 0.6,
        "decision": {"rule": "predictor", "threshold": 0.4},
        "prefill": "topk",
        "cache": {"capacity": 0.3},
    },
}
# llama has them all in both forms; every other family every second one, half of them in each form.
CASES = [
    pytest.param(family, contract, static, id=f"{'static' if static else 'conditional'}-{family}-{contract}")
    for place, family in enumerate(EXEMPLARS)
    for number, contract in enumerate(CONTRACTS)
    for static in (False, True)
    if family == "llama" or (place + number) % 4 == 2 * static
]
# Lengths that no graph was built with; after them generated tokens, a second prompt, and generated tokens again.
TALK = Talk.random((1, 2, 5, 17, 33), (4,) * 5, (6, 1, 3, 5, 2), (3,) * 5)

Golden = tuple[ModReference, list[tuple[np.ndarray, RowRoutes]]]


@pytest.fixture(scope="module")
def routed_model(saved_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def save(family: str) -> Path:
        directory = tmp_path_factory.mktemp(f"{family}-routed") / "model"
        save_routed_model(directory, saved_model(family))
        return directory

    return save


@pytest.fixture(scope="module")
def golden(routed_model: Callable[[str], Path]) -> Callable[[str, str], Golden]:
    @cache
    def answer(family: str, contract: str) -> Golden:
        model = reference(routed_model(family), CONTRACTS[contract])
        return model, list(zip(*model.routed_logits(TALK.rows, TALK.prompted), strict=True))

    return answer


def reference(directory: Path, fields: dict[str, Any], max_length: int = CONTEXT) -> ModReference:
    checkpoint = open_checkpoint(directory)
    contract = parse_contract({**checkpoint.config["dynexport"], **fields}, "test")
    return ModReference.from_checkpoint(checkpoint, contract=contract, max_length=max_length)


def executor(
    directory: Path,
    bundle: Path,
    fields: dict[str, Any],
    static: bool,
    max_length: int = CONTEXT,
    *,
    plugins: bool = False,
) -> Executor:
    convert(directory, bundle, fields=fields, static=static, max_length=max_length, plugins=plugins, golden=False)
    return Executor(Bundle.open(bundle), threads=1)


@pytest.mark.parametrize(("family", "contract", "static"), CASES)
def test_conversation(
    family: str,
    contract: str,
    static: bool,
    golden: Callable[[str, str], Golden],
    routed_model: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    run = executor(routed_model(family), tmp_path / "bundle", CONTRACTS[contract], static)
    compare(golden(family, contract), run, TALK)


@pytest.mark.parametrize("library", [True, False], ids=["library", "bodies"])
@pytest.mark.parametrize("contract", CONTRACTS)
def test_conversation_with_our_operators(
    contract: str,
    library: bool,
    golden: Callable[[str, str], Golden],
    routed_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where there is no library, the operators' bodies run twice."""
    if not library:
        monkeypatch.setenv(VARIABLE, "")
    fields = CONTRACTS[contract]
    run = executor(routed_model("llama"), tmp_path / "bundle", fields, static=False, plugins=True)
    decides = "prefill" not in fields and fields.get("decision", {}).get("rule", "router") == "router"
    adds = fields.get("gate") != "none" and fields.get("combine") != "replace"
    expected = (
        {"CachedAttention", "GatherTokens"}
        | ({"RouteTokens"} if decides else set())
        | ({"ScatterGated"} if adds else set())
    )
    assert set(run.manifest.operators) == expected
    compare(golden("llama", contract), run, TALK)


@pytest.mark.parametrize("contract", CONTRACTS)
def test_the_contracts_choose_and_overflow(contract: str, golden: Callable[[str, str], Golden]) -> None:
    """What is compared is not all, and not nothing."""
    _, expected = golden("llama", contract)
    share = np.concatenate([routes.chosen for _, routes in expected], axis=1).mean()
    assert 0.1 < share < 0.9
    assert ("overflow" in contract) == bool(sum(routes.overflow.sum() for _, routes in expected))


@pytest.mark.parametrize("static", [False, True], ids=["conditional", "static"])
def test_thousands_of_greedy_decisions(static: bool, routed_model: Callable[[str], Path], tmp_path: Path) -> None:
    """20 rows of 64 tokens in 4 layers, three quarters of them generated."""
    fields, context = {"routed_layers": [0, 1, 2, 3], "router_input": "normed", "gate": "sigmoid"}, 64
    directory = routed_model("llama")
    run = executor(directory, tmp_path / "bundle", fields, static, context)
    prompts = random_rows(*[16] * 20, seed=11)
    state = run.full_cache(len(prompts), context, record=True)
    rows = [list(prompt) for prompt in prompts]
    best = np.concatenate(run.prefill(state, prompts)).argmax(1)
    while len(rows[0]) < context:
        for row, token in zip(rows, best.tolist(), strict=True):
            row.append(token)
        best = run.step(state, best, run.bundle.depth(None)).argmax(1)
    _, expected = reference(directory, fields, context).routed_logits(rows, [[]] * len(rows))
    found = np.stack([finished(run, state, row, [np.zeros(0)]).chosen for row in range(len(rows))])
    chosen, margin = (np.stack([getattr(row, part) for row in expected]) for part in ("chosen", "margin"))
    assert chosen.size >= 5000 and 0.2 < chosen.mean() < 0.8
    first = np.argwhere((found != chosen).any(axis=(1, 2)))[:, 0]
    for row in first:  # of a row that departs, where it does so first
        token = np.argwhere((found[row] != chosen[row]).any(axis=0))[0, 0]
        layer = np.argwhere(found[row, :, token] != chosen[row, :, token])[0, 0]
        assert margin[row, layer, token] < NEAR
    assert len(first) <= 1
