"""Cells in the palette, tokens as labels, and what is told in words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from dynexport.exporter.trace import Token, Trace, look
from dynexport.exporter.trace.colours import RAN, ROUTED_RAN, ROUTED_SKIPPED, SKIPPED


def test_shades_follow_the_scores_of_those_that_ran_and_of_those_that_did_not(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(3, [1], 10, 30)
    cells, scores, ran = look.cells(trace)[1], np.array(trace.scores[0], float), np.array(trace.ran[1])
    for group, shades in ((ran, ROUTED_RAN), (~ran, ROUTED_SKIPPED)):
        assert group.any() and set(cells[group]) <= set(shades)
        assert (np.diff(cells[group][np.argsort(scores[group])]) >= 0).all()
        assert cells[group].max() == shades[-1]
    assert (look.cells(trace)[[0, 2]] == RAN).all()


def test_a_token_without_a_score_has_the_first_shade(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(1, [0], 4, 0).model_copy(update={"scores": ((None, None, None, None),)})
    assert set(look.cells(trace)[0]) <= {ROUTED_RAN[0], ROUTED_SKIPPED[0]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" river", "river"),
        (" ", "␣"),
        ("  ", "␣␣"),
        ("\n\n", "↵↵"),
        ("\tx", "⇥x"),
        ("\u202eabc\x00", "\\u202eabc\\x00"),
        ("a" * 14, "a" * 14),
        ("a" * 15, "a" * 13 + "…"),
        ("", "#7"),
        (None, "7"),
    ],
)
def test_labels(text: str | None, expected: str) -> None:
    assert look.label(Token(id=7, text=text, is_prompt=True)) == expected


def test_what_is_told_of_a_trace(make_trace: Callable[..., Trace]) -> None:
    trace = make_trace(2, [1], 3, 5)
    share = trace.routed[0].rate
    assert look.headline(trace) == f"mod: {1 + share:.1f} of 2 layers per token"
    counted = "tokens: 3 of the prompt, 5 generated and fed back"
    assert look.facts(trace) == f"{counted}; routed layers ran {100 * share:.0f} % of tokens; overflow 2"
    skipping = make_trace(2, [], 3, 5).model_copy(update={"strategy": "unified-skip", "speedup": "1.5"})
    assert look.headline(skipping) == "unified-skip at ratio 1.5: 2.0 of 2 layers per token"
    assert look.facts(skipping) == counted
    assert [words for _, words in look.meanings(skipping)] == ["ran"]


def test_a_path_is_told_by_steps(path_trace: Trace) -> None:
    assert path_trace.paths == ((2, 0), (1, 1, 1), ())
    assert path_trace.depth == (2, 3, 0)
    assert look.steps(path_trace) == {(2, 0): "1", (0, 0): "2", (1, 1): "1-3"}
    cells = look.cells(path_trace)
    assert cells[2, 0] == ROUTED_RAN.start < cells[0, 0] < cells[1, 1]
    assert (cells[[0, 1, 2], [2, 2, 2]] == SKIPPED).all()
    assert [words for _, words in look.meanings(path_trace)][-1] == "did not run"


def test_steps_that_follow_each_other_are_told_at_once(path_trace: Trace) -> None:
    again = path_trace.model_copy(update={"paths": ((0, 1, 0, 0, 1),), "tokens": path_trace.tokens[:1]})
    assert look.steps(again) == {(0, 0): "1·3-4", (1, 0): "2·5"}
