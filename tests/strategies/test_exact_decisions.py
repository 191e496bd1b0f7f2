"""Decisions that hang on a single bit: probabilities at the threshold, equal scores, the least number of steps.

Made-up numbers elsewhere never meet a threshold: exchanged operators, such as > for >=, would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import change_tensors, checkpoint

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.execution.kv_cache import KvCache

PROMPT = [5, 17, 3, 80, 41, 2, 66]
FORMS: dict[str, dict[str, Any]] = {
    "conditional": {},
    "static": {"static": True},
    "tensorrt": {"target": "tensorrt"},
}
PASSES: dict[str, Callable[[Any, Any], Any]] = {">": np.greater, ">=": np.greater_equal}


def decoder_of(model: Path, output: Path, **how: Any) -> Executor:
    convert(model, output, golden=False, **how)
    return Executor(Bundle.open(output), threads=1)


def decided(executor: Executor, *, by_steps: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of every token of the prompt: bool [R, tokens] whether it ran, and the distance to the threshold."""
    cache: KvCache = executor.full_cache(1, len(PROMPT), record=True)
    if by_steps:
        for token in PROMPT:
            executor.step(cache, [token], executor.bundle.depth(1))
    else:
        executor.prefill(cache, [PROMPT])
    assert cache.logs is not None
    found = executor.reader.joined(cache.logs[0])
    return found.choices == 1, found.margins


@pytest.mark.parametrize(
    ("case", "form"), [*(("mod-router", form) for form in FORMS), ("mod-predictor-normed", "conditional")]
)
def test_a_probability_at_the_threshold_passes_where_the_contract_says_so(tmp_path: Path, case: str, form: str) -> None:
    """The first routed layer, whose scores no other decision changes: its threshold is one token's very probability."""
    model = checkpoint(tmp_path / "m", case)

    def with_threshold(name: str, value: float, comparison: str) -> Executor:
        fields = {"decision": {"threshold": 0.5, "comparison": comparison}, "thresholds": {"1": value}}
        return decoder_of(model, tmp_path / name, fields=fields, **FORMS[form])

    ran, margins = decided(with_threshold("half", 0.5, ">"), by_steps=True)
    probabilities = np.float32(0.5) + np.where(ran[0], margins[0], -margins[0])
    # A float32 between 0.25 and 1 less a half is exact, so these are what the graph compared.
    exact = np.sort(probabilities[(probabilities > 0.25) & (probabilities < 1)])
    middle = exact[len(exact) // 2]
    for comparison, passes in PASSES.items():
        executor = with_threshold(f"at {comparison}", float(middle), comparison)
        for by_steps in (True, False):
            ran, margins = decided(executor, by_steps=by_steps)
            at = np.flatnonzero(margins[0] == 0)
            # A prompt's products may be added up in another order: whoever is at the threshold there is compared.
            assert by_steps <= (len(at) > 0)
            assert (ran[0][at] == (comparison == ">=")).all()
            if by_steps:
                assert (ran[0] == passes(probabilities, middle)).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("comparison", PASSES)
def test_a_logit_of_zero_is_at_one_half(tmp_path: Path, form: str, comparison: str) -> None:
    """In both lowerings, in prompts and steps: sigmoid(0) is 0.5 to the last bit."""
    model = checkpoint(tmp_path / "m", "mod-router")
    change_tensors(model, _without_routers)
    fields = {"decision": {"threshold": 0.5, "comparison": comparison}}
    executor = decoder_of(model, tmp_path / "b", fields=fields, **FORMS[form])
    for by_steps in (True, False):
        ran, margins = decided(executor, by_steps=by_steps)
        assert (margins == 0).all() and (ran == (comparison == ">=")).all()


def _without_routers(tensors: dict[str, np.ndarray]) -> None:
    for name, value in tensors.items():
        if "mod_router" in name:
            value[...] = 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_top_k_takes_the_first_of_equal_scores(tmp_path: Path, form: str, rounding: str) -> None:
    model = checkpoint(tmp_path / "m", "mod-topk")
    change_tensors(model, _without_routers)
    fields = {"capacity": 0.4, "rounding": rounding}
    executor = decoder_of(model, tmp_path / "b", fields=fields, **FORMS[form])
    rows = [PROMPT, PROMPT[:2], PROMPT[:5]]
    cache: KvCache = executor.full_cache(len(rows), len(PROMPT), record=True)
    executor.prefill(cache, rows)
    counts = {"floor": (2, 1, 2), "ceil": (3, 1, 2)}[rounding]
    assert cache.logs is not None
    for row, log, count in zip(rows, cache.logs, counts, strict=True):
        ran = executor.reader.joined(log).choices
        assert (ran == (np.arange(len(row)) < count)).all(), (len(row), ran)


RADIAL_FORMS: dict[str, dict[str, Any]] = {
    "set": {},
    "single": {"layer_capacity": 1.0},
    "tensorrt": {"target": "tensorrt"},
    "tensorrt-decode": {"target": "tensorrt", "plugins": True},
}


@pytest.mark.parametrize("form", RADIAL_FORMS)
@pytest.mark.parametrize(("leaving", "reuse"), [(0.0, False), (1.0, True)], ids=["equal scores", "leaving is best"])
def test_equal_scores_go_to_the_lowest_layer_and_none_leaves_before_the_least_steps(
    tmp_path: Path, form: str, leaving: float, reuse: bool
) -> None:
    model = checkpoint(tmp_path / "m", "radial-step")

    def equal(tensors: dict[str, np.ndarray]) -> None:
        for name, value in tensors.items():
            if "radial_router" in name and "fc2" in name:
                value[...] = 0
                if name.endswith("bias"):
                    value[-1] = leaving

    change_tensors(model, equal)
    executor = decoder_of(model, tmp_path / "b", fields={"min_steps": 2, "allow_reuse": reuse}, **RADIAL_FORMS[form])
    contract, layers = executor.manifest.contract, executor.manifest.model.layers
    order = [0] * contract.max_steps if reuse else list(range(min(layers, contract.max_steps)))
    expected = [*order[:2], layers] if leaving else order
    if not leaving and len(order) < contract.max_steps:
        expected = [*order, layers]  # nothing else is allowed any more
    cache = executor.full_cache(1, 8, record=True)
    executor.prefill(cache, [PROMPT[:3]])
    executor.step(cache, [7], executor.bundle.depth(1))
    paths = executor.reader.joined(cache.logs[0]).choices.T.tolist()
    assert [[choice for choice in path if choice >= 0] for path in paths] == [expected] * 4
