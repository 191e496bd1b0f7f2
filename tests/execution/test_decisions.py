"""What is no decision is refused in one line; pieces of a row's decisions join to the row's."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from dynexport.runtime import DynexportError
from dynexport.runtime.bundle.manifest import LayerRouting, Manifest, PathRouting
from dynexport.runtime.execution.decisions import DecisionReader, Decisions

MODEL_LAYERS, LAYERS, ROWS, TOKENS = 6, (2, 5), 3, 4
COUNTS, POSITIONS = np.array([4, 1, 0]), np.array([10, 20, 30])
ACTIVE = np.ones(MODEL_LAYERS, bool)
SLOTS, FIRST_ROW = 9, 7


def reader(routing: LayerRouting | PathRouting | None) -> DecisionReader:
    caches = [SimpleNamespace(place=place, most=SLOTS) for place in range(MODEL_LAYERS)]
    manifest = SimpleNamespace(routing=routing, model=SimpleNamespace(layers=MODEL_LAYERS), caches=caches)
    return DecisionReader(cast(Manifest, manifest))


def by_layers(overflow: Any = "error") -> DecisionReader:
    return reader(LayerRouting(layers=LAYERS, overflow=overflow))


def by_paths(**fields: Any) -> DecisionReader:
    how = {"hops": 2, "min_hops": 0, "exit": True, "reuse": True, "places": "hops", **fields}
    return reader(PathRouting.model_validate(how))


def routes(**changed: Any) -> dict[str, np.ndarray]:
    shape = len(LAYERS), ROWS, TOKENS
    parts = {
        "routes": np.zeros(shape, bool),
        "route_scores": np.zeros(shape, np.float32),
        "route_margins": np.zeros(shape, np.float32),
        "overflow": np.zeros(shape[:2], np.int64),
    }
    for part, (place, value) in changed.items():
        parts[part if part == "overflow" else f"route_{part}"][place] = value
    return parts


def read(found: Mapping[str, np.ndarray], overflow: str = "error") -> tuple[np.ndarray, list[Decisions]]:
    return by_layers(overflow).read(found, COUNTS, POSITIONS, ACTIVE, FIRST_ROW)


def refused(found: Mapping[str, np.ndarray]) -> str:
    with pytest.raises(DynexportError) as caught:
        read(found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_outputs_of_a_graph_by_name() -> None:
    found = routes(scores=((0, 0, 1), 2.0), margins=((1, 0, 1), 3.0))
    found["routes"][1, 0, 2:] = found["routes"][0, 1, 0] = True
    entries, rows = read({**found, "logits": np.zeros(1)})
    assert entries.T.tolist() == [[4, 4, 0, 4, 4, 2], [1, 1, 1, 1, 1, 0], [0] * 6]
    assert [row.choices.tolist() for row in rows] == [[[0] * 4, [0, 0, 1, 1]], [[1], [0]], [[], []]]
    assert rows[0].scores[0, 1] == 2 and rows[0].margins[1, 1] == 3
    assert rows[0].ran[[0, 2, 5]].tolist() == [[True] * 4, [False] * 4, [False, False, True, True]]
    assert by_layers().outputs == ["routes", "route_scores", "route_margins", "overflow"]


@pytest.mark.parametrize(
    ("places", "expected"), [("hops", [[2, 1, 0], [1, 0, 0]]), ("layers", [[1, 0, 0], [1, 0, 0], [1, 1, 0]])]
)
def test_entries_of_paths(places: str, expected: list[list[int]]) -> None:
    """A token that leaves, has left or was turned away makes no entry."""
    paths = np.full((2, ROWS, TOKENS), -1)
    paths[0, 0], paths[1, 0, :2], paths[:, 1, 0] = [0, 2, 6, -2], [1, 6], [2, -2]
    zeros = np.zeros(paths.shape, np.float32)
    found = {"paths": paths, "path_scores": zeros, "path_margins": zeros}
    entries, rows = by_paths(places=places).read(found, COUNTS, POSITIONS, ACTIVE, FIRST_ROW)
    assert entries.tolist()[: len(expected)] == expected and not entries[len(expected) :].any()
    assert (
        rows[0].ran.sum(axis=0).tolist() == [2, 1, 0, 0]
        and rows[1].ran[:, 0].tolist() == [False, False, True] + [False] * 3
    )


def test_what_is_a_route_passes() -> None:
    read(routes())
    read(routes(scores=((0, 0, 0), np.inf), margins=((1, 0, 3), np.inf)))


@pytest.mark.parametrize("part", ["scores", "margins"])
@pytest.mark.parametrize(
    ("place", "told"), [((0, 0, 3), "layer 2: row 7, token 3: "), ((1, 1, 0), "layer 5: row 8, token 0: ")]
)
def test_a_real_token_s_score_that_is_no_number_is_told_with_its_place(
    part: str, place: tuple[int, int, int], told: str
) -> None:
    message = refused(routes(**{part: (place, np.nan)}))
    assert message.startswith(told + "expected a router score, found NaN") and "dynexport verify" in message


@pytest.mark.parametrize(("part", "value"), [("scores", np.nan), ("scores", np.inf), ("margins", np.nan)])
def test_a_path_s_score_that_is_no_number_is_told_with_its_position(part: str, value: float) -> None:
    parts = {"paths": np.zeros((2, ROWS, TOKENS), np.int64)}
    parts |= {f"path_{name}": np.zeros((2, ROWS, TOKENS), np.float32) for name in ("scores", "margins")}
    parts[f"path_{part}"][:, 1, 1:] = value  # padding
    by_paths().read(parts, COUNTS, POSITIONS, ACTIVE, FIRST_ROW)
    parts[f"path_{part}"][1, 1, 0] = value
    with pytest.raises(DynexportError, match=r"^hop 1: row 8, position 20: expected router scores, found NaN or inf"):
        by_paths().read(parts, COUNTS, POSITIONS, ACTIVE, FIRST_ROW)


@pytest.mark.parametrize("place", [(0, 1, 1), (1, 2, 0), (1, slice(2, 3), slice(None))])
def test_padding_and_ended_rows_may_score_what_they_like(place: Any) -> None:
    read(routes(scores=(place, np.nan), margins=(place, np.nan)))


def test_the_first_of_several_is_told() -> None:
    assert refused(routes(scores=((slice(None), 0, slice(1, 3)), np.nan))).startswith("layer 2: row 7, token 1: ")


def test_an_overflow_is_an_error_where_the_contract_says_so() -> None:
    found = routes(overflow=((1, 1), 2))
    message = refused(found)
    assert message.startswith("layer 5: row 8: all 9 entries of its cache are used")
    assert "cache.capacity" in message and "residual" in message
    assert read(found, overflow="residual")[1][1].overflow.tolist() == [0, 2]


def test_a_score_is_looked_at_before_the_overflow() -> None:
    found = routes(scores=((1, 0, 0), np.nan), overflow=((0, 0), 1))
    assert "expected a router score" in refused(found)


@pytest.mark.parametrize("value", [-2, 2, 7])
def test_what_no_router_of_a_layer_decides(value: int) -> None:
    by_layers().check_forced(np.array([[-1, 0], [1, 0]]))
    with pytest.raises(DynexportError, match=rf"^forced: expected 1 to run, 0 to skip or -1 .*, found {value}$"):
        by_layers().check_forced(np.array([[-1, 0], [1, value]]))


@pytest.mark.parametrize(("leaving", "wrong"), [(True, 7), (False, 6), (True, -2)])
def test_what_no_router_of_a_path_decides(leaving: bool, wrong: int) -> None:
    found = by_paths(exit=leaving)
    found.check_forced(np.array([[-1, 5], [0, 6 if leaving else 5]]))
    leave = ", 6 to leave" if leaving else ""
    with pytest.raises(
        DynexportError, match=rf"^forced path: hop 1: expected a layer 0\.\.5{leave} or -1, found {wrong}"
    ):
        found.check_forced(np.array([[-1, 5], [0, wrong]]))


def test_pieces_of_a_row_join() -> None:
    """Tokens one after the other, tokens that found no room added up."""
    found = by_layers()
    whole = read(routes(scores=((0, 0), [1, 2, 3, 4]), overflow=((1, 0), 3)), overflow="residual")[1][0]
    pieces = [
        Decisions(*(getattr(whole, name)[:, part] for name in ("ran", "choices", "scores", "margins")), overflow)
        for part, overflow in ((slice(0, 3), np.array([0, 1])), (slice(3, 4), np.array([0, 2])))
    ]
    joined = found.joined(pieces)
    for name in ("ran", "choices", "scores", "margins", "overflow"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
    assert found.joined([whole]) is whole


@pytest.mark.parametrize(("found", "rows"), [(by_layers(), 2), (by_paths(), 2), (reader(None), 0)])
def test_nothing_joins_to_no_tokens(found: DecisionReader, rows: int) -> None:
    none = found.joined([])
    assert none.ran.shape == (MODEL_LAYERS, 0) and none.ran.dtype == bool
    assert none.choices.shape == none.scores.shape == none.margins.shape == (rows, 0)
    assert none.choices.dtype == np.int64 and not none.overflow.any()


def test_without_routers_a_token_runs_where_its_depth_says() -> None:
    active = ACTIVE.copy()
    active[3] = False
    entries, decided = reader(None).read({}, COUNTS, POSITIONS, active, FIRST_ROW)
    assert decided is None
    rows = [reader(None).unrouted(active, count) for count in COUNTS.tolist()]
    assert entries.T.tolist() == [[4, 4, 4, 0, 4, 4], [1, 1, 1, 0, 1, 1], [0] * 6]
    assert [row.ran.shape for row in rows] == [(6, 4), (6, 1), (6, 0)] and not rows[0].ran[3].any()
