"""Requests that leave at different loops share steps, and get what an independent implementation gives each alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from requests_of_tests import CHUNK, Inbox, model_of, run, work
from routes_of_cases import LOOPED, runs_of

from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings


@pytest.mark.parametrize("drafts", [None, "lookup", "full"])
@pytest.mark.parametrize("form", LOOPED)
def test_rows_that_leave_at_different_loops_share_a_step(
    form: str, drafts: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = model_of(form), runs_of(form)
    full = model.bundle.manifest.full
    drafting = None if drafts is None else Speculation(4, full if drafts == "full" else None, always=True)
    settings = Settings(rows=len(expected), chunk=CHUNK, prefix_bytes=1 << 20, speculation=drafting)
    scheduler = Scheduler(model.executor, settings)
    together: list[list[int]] = []
    decode = model.executor.decode

    def watched(cache: KvCache, rows: Sequence[int], *rest: object, **more: object) -> object:
        found = decode(cache, rows, *rest, **more)  # type: ignore[arg-type]
        assert cache.logs is not None
        together.append([int(cache.logs[row][-1].ran[:, -1].sum()) for row in rows])
        return found

    monkeypatch.setattr(model.executor, "decode", watched)
    asked = [(each, Inbox()) for each in [*expected, *reversed(expected)]]  # the second half has known prefixes
    for answer, inbox in asked:
        scheduler.add(work(model, answer.prompt, len(answer.greedy), inbox))
        scheduler.step()
        scheduler.step()
    run(scheduler)
    for answer, inbox in asked:
        assert inbox.tokens == {0: answer.greedy}
        assert [each.layers for delivery in inbox.deliveries for each in delivery.answered] == answer.layers
    if drafts is None:  # with drafts other calls decode
        apart = [each for each in together if len(set(each)) > 1]
        assert len(apart) > 10, f"rows of {len(together)} steps were to leave at different loops: {together}"
        assert any(len(set(each)) == 3 for each in apart)
