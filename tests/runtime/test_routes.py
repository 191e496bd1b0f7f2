"""What is no route is refused in one line; logs keep what they are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dynexport.runtime import DynexportError
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.execution.routes import RowLog, StepRoutes

LAYERS, ROWS, TOKENS = (2, 5), 3, 4
COUNTS = np.array([4, 1, 0])
SLOTS = 9


def routes(**changed: Any) -> StepRoutes:
    shape = len(LAYERS), ROWS, TOKENS
    parts = {
        "chosen": np.zeros(shape, bool),
        "scores": np.zeros(shape, np.float32),
        "margins": np.zeros(shape, np.float32),
        "overflow": np.zeros(shape[:2], np.int64),
    }
    for part, (place, value) in changed.items():
        parts[part][place] = value
    return StepRoutes(**parts)


def check(found: StepRoutes, overflow: str = "error") -> None:
    found.check(Mod(routed_layers=LAYERS, cache={"overflow": overflow}), SLOTS, COUNTS)


def refused(found: StepRoutes) -> str:
    with pytest.raises(DynexportError) as caught:
        check(found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs_of_a_graph_by_name() -> None:
    named = {name: np.array([i]) for i, name in enumerate(("overflow", "routes", "route_margins", "route_scores"))}
    found = StepRoutes.of({**named, "logits": np.zeros(1)})
    assert [found.overflow[0], found.chosen[0], found.margins[0], found.scores[0]] == [0, 1, 2, 3]


def test_what_is_a_route_passes() -> None:
    check(routes())
    check(routes(scores=((0, 0, 0), np.inf), margins=((1, 0, 3), np.inf)))


@pytest.mark.parametrize("part", ["scores", "margins"])
@pytest.mark.parametrize(
    ("place", "told"), [((0, 0, 3), "layer 2: row 0, token 3: "), ((1, 1, 0), "layer 5: row 1, token 0: ")]
)
def test_a_real_token_s_score_that_is_no_number_is_told_with_its_place(
    part: str, place: tuple[int, int, int], told: str
) -> None:
    message = refused(routes(**{part: (place, np.nan)}))
    assert message.startswith(told + "expected a router score, found NaN") and "dynexport verify" in message


@pytest.mark.parametrize("place", [(0, 1, 1), (1, 2, 0), (1, slice(2, 3), slice(None))])
def test_padding_and_ended_rows_may_score_what_they_like(place: Any) -> None:
    check(routes(scores=(place, np.nan), margins=(place, np.nan)))


def test_the_first_of_several_is_told() -> None:
    assert refused(routes(scores=((slice(None), 0, slice(1, 3)), np.nan))).startswith("layer 2: row 0, token 1: ")


def test_an_overflow_is_an_error_where_the_contract_says_so() -> None:
    found = routes(overflow=((1, 1), 2))
    message = refused(found)
    assert message.startswith("layer 5: row 1: all 9 entries of its cache are used")
    assert "cache.capacity" in message and "residual" in message
    check(found, overflow="residual")


def test_a_score_is_looked_at_before_the_overflow() -> None:
    found = routes(scores=((1, 0, 0), np.nan), overflow=((0, 0), 1))
    assert "expected a router score" in refused(found)


def log_of(*lengths: int) -> RowLog:
    log = RowLog()
    for length in lengths:
        log.ran.append(np.ones((6, length), bool))
        log.scores.append(np.zeros((2, length), np.float32))
        log.margins.append(np.zeros((2, length), np.float32))
    return log


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_a_log_keeps_its_first_steps(steps: int) -> None:
    log = log_of(5, 1, 1)
    log.keep(steps)
    for part in (log.ran, log.scores, log.margins):
        assert [array.shape[1] for array in part] == [5, 1, 1][:steps]


def test_a_log_without_scores_keeps_its_steps_too() -> None:
    log = RowLog(ran=[np.ones((6, 2), bool)] * 3)
    log.keep(2)
    assert (len(log.ran), log.scores, log.margins) == (2, [], [])


def test_a_log_forgets() -> None:
    log = log_of(5, 1)
    log.clear()
    assert not (log.ran or log.scores or log.margins)
