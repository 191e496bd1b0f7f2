"""Decisions about a whole sequence depend on all of its prompt: no part of one is cut off, or known from another."""

from __future__ import annotations

import pytest
from requests_of_tests import CHUNK, Inbox, alone, model_of, run, work

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings

BEGIN = [5, 6, 7, 8, 9, 10, 11, 12]
# The layers that each token runs in after the prompt BEGIN and these tokens: three decisions for one beginning.
ENDS = {(1,): 4, (30,): 2, (40, 41): 3, (80, 80, 80): 2}


def test_prompts_that_begin_alike_are_decided_about_each_as_a_whole() -> None:
    model = model_of("mod-sequence")
    scheduler = Scheduler(model.executor, Settings(rows=3, chunk=CHUNK, prefix_bytes=1 << 20))
    asked = []
    for end, layers in [*ENDS.items(), *ENDS.items()]:
        asked.append((works := work(model, [*BEGIN, *end], 6, inbox := Inbox(), n=1 + len(asked) % 2), inbox, layers))
        scheduler.add(works)
        scheduler.step()
    run(scheduler)
    for works, inbox, layers in asked:
        expected = alone(model, works.prompt.tolist(), 6, n=len(works.requests))
        assert [inbox.tokens[answer] for answer in sorted(inbox.tokens)] == expected
        assert {each.layers for delivery in inbox.deliveries for each in delivery.answered} == {layers}
        assert works.reused == 0


def test_entries_of_a_sequences_beginning_are_not_handed_out() -> None:
    model = model_of("mod-sequence")
    cache = model.executor.cache(2, 20)
    cache.acquire(2)
    with pytest.raises(DynexportError, match="cache: expected a prefix that does not depend on the tokens after it"):
        cache.save(0, cache.lengths[:, 0].copy(), 0)
    with pytest.raises(DynexportError, match="cache: expected a prefix that does not depend on the tokens after it"):
        cache.copy_prefix(cache.mark(0), 1)
