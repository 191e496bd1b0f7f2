"""Drafts: where they come from, how many pay, and what a user may ask for."""

from __future__ import annotations

import numpy as np
import pytest

from dynexport.runtime import Conversation, DynexportError, Model, Sampling
from dynexport.runtime.generation.draft_length import Acceptance, CallTimes, best_count
from dynexport.runtime.generation.drafts import KnownTokens
from dynexport.runtime.generation.speculation import Speculation, Speculators


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], [3, 4, 5, 1]),  # what followed "1 2"
        ([9, 1, 2, 3, 8, 1, 2, 3, 4, 9, 1, 2, 3], [8, 1, 2, 3]),  # "9 1 2 3" before the later "1 2 3"
        ([1, 2, 7, 1, 2, 8, 1, 2], [8, 1, 2, 8]),  # the latest; beyond the end it repeats
        ([5, 5, 5, 5], [5, 5, 5, 5]),
        ([1, 2, 3, 4], []),
        ([1], []),
    ],
)
def test_prompt_lookup_continues_the_latest_and_longest_occurrence(tokens: list[int], expected: list[int]) -> None:
    assert KnownTokens(tokens).continued(4) == expected


def test_times_between_known_ones_are_on_a_line_and_beyond_them_a_guess() -> None:
    calls = CallTimes()
    assert calls.of(3) == 0
    calls.add(1, 10.0)
    assert calls.of(5) == pytest.approx(14)
    calls.add(5, 30.0)
    assert [calls.of(tokens) for tokens in (1, 2, 5)] == pytest.approx([10, 15, 30])
    calls.add(1, 1000.0)  # a disturbed step moves the average by a fifth of twice its value at most
    assert calls.of(1) == pytest.approx(12)


@pytest.mark.parametrize(
    ("rate", "share", "expected"),
    [(0.9, 0.0, 8), (0.05, 0.0, 0), (0.9, 0.2, 5), (0.9, 0.95, 0), (0.3, 0.2, 0)],
)
def test_as_many_drafts_as_give_the_most_tokens_a_second(rate: float, share: float, expected: int) -> None:
    calls = CallTimes()
    for tokens in range(1, 10):
        calls.add(tokens, 1.0 + 0.1 * (tokens - 1))
    speeds = [(1 - rate ** (n + 1)) / (1 - rate) / (calls.of(n + 1) + n * share) for n in range(9)]
    chances = [[rate ** (count + 1) for count in range(8)]]
    assert best_count(chances, calls, share) == int(np.argmax(speeds)) == expected


def test_a_row_without_drafts_does_not_make_the_others_wait() -> None:
    calls = CallTimes()
    for tokens in range(1, 20):
        calls.add(tokens, 1.0 + 0.05 * tokens)
    assert best_count([[], [0.9 ** (count + 1) for count in range(6)]], calls, 0.0) == 6
    assert best_count([[], []], calls, 0.0) == 0


def test_acceptance_follows_the_drafts_and_forgets_without_them() -> None:
    seen = Acceptance()
    first = seen.rate
    for _ in range(30):
        seen.add(4, 0)
    assert seen.rate < 0.01 and (seen.drafted, seen.accepted) == (120, 0)
    low = seen.rate
    for _ in range(400):
        seen.add(0, 0)
    assert low < seen.rate <= first
    for _ in range(30):
        seen.add(4, 4)
    assert seen.rate > 0.99


def test_drafts_that_fail_again_and_again_are_tried_less_often() -> None:
    seen = Acceptance()

    def steps_until_tried() -> int:
        seen.add(2, 0)
        steps = 0
        while seen.rate < 0.4:
            seen.add(0, 0)
            steps += 1
        return steps

    waits = [steps_until_tried() for _ in range(8)]
    assert waits[2] > 2 * waits[0] and waits[-1] == pytest.approx(waits[-2], rel=0.1)
    seen.add(2, 2)
    assert steps_until_tried() < waits[2]


def test_a_depth_that_did_not_pay_is_not_tried_anew_for_every_text(generator: Model) -> None:
    """A text tells of the next one's drafts where a depth made them, not where they were looked up."""
    executor, shallow = generator.executor, generator.bundle.manifest.depths[0]
    for how, same in ((Speculation(4, shallow), True), (Speculation(4), False)):
        speculators, rates = Speculators(), []
        for _ in range(2):
            with speculators.lent(executor, how) as lent, speculators.lent(executor, how) as other:
                assert lent is not other
                rates.append(lent.acceptance().rate)
                for speculator in (lent, other):
                    speculator.accepted(3, 0)
        assert (rates[1] < rates[0]) == same


def test_a_shallow_depth_drafts_and_the_full_one_decides(generator: Model) -> None:
    prompts = [[5], [7, 8, 9, 10, 11], [60, 61, 62]]
    shallow = generator.bundle.manifest.depths[0]
    for sampling in (Sampling(), Sampling(temperature=0.7, seed=11, top_p=0.9)):
        plain = generator.generate(prompts, max_new_tokens=40, depth="full", sampling=sampling)
        for how in (Speculation(4, shallow), Speculation(4, generator.bundle.manifest.full), Speculation(4)):
            drafted = generator.generate(prompts, max_new_tokens=40, depth="full", sampling=sampling, speculation=how)
            assert drafted == plain


def test_a_conversation_that_is_closed_within_a_step_goes_on(generator: Model) -> None:
    how = {"depth": "full", "max_new_tokens": 20, "sampling": Sampling()}
    plain, drafted = Conversation(generator), Conversation(generator)
    full = Speculation(6, generator.bundle.manifest.full)  # every draft is accepted
    for talk, speculation in ((plain, None), (drafted, full)):
        stream = talk.say("one", **how, speculation=speculation)
        for _ in range(9):
            next(stream)
        stream.close()
    assert drafted.messages == plain.messages
    again = [[piece.token for piece in talk.say("two", **how)] for talk in (plain, drafted)]
    assert again[0] == again[1]


@pytest.mark.parametrize("most", [0, -1, 65, 2.5, True, "8"])
def test_a_number_of_drafts_that_cannot_be(most: object) -> None:
    with pytest.raises(DynexportError, match="speculate: expected"):
        Speculation(most)  # type: ignore[arg-type]


def test_other_types_are_refused(generator: Model) -> None:
    with pytest.raises(DynexportError, match="always: expected true or false, found 1"):
        Speculation(8, always=1)  # type: ignore[arg-type]
    with pytest.raises(DynexportError, match="speculation: expected a Speculation or None, found 8"):
        generator.generate([1, 2], speculation=8)  # type: ignore[call-overload]
