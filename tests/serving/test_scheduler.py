"""A scheduler's requests give, each, the tokens that the model gives them alone, whatever else runs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from forms import FORMS, SERVED
from requests_of_tests import CHUNK, Inbox, alone, model_of, run, work

from dynexport.runtime.bundle.errors import DynexportError, RouteError
from dynexport.runtime.execution import batch
from dynexport.runtime.execution.kv_cache import KvCache
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings

ROWS = 3


@pytest.mark.parametrize(
    ("prefix_bytes", "drafts"),
    [(0, None), (1 << 20, None), (1 << 20, "lookup"), (1 << 20, "full")],
    ids=["no prefixes", "prefixes", "looked-up drafts", "right drafts"],
)
@pytest.mark.parametrize("form", [*FORMS, *SERVED])
def test_every_request_gives_the_tokens_that_it_gives_alone(form: str, prefix_bytes: int, drafts: str | None) -> None:
    if drafts == "full" and "int8-caches" in form:
        drafts = "lookup"  # a draft attends to keys and values before they are rounded: another rounding (docs)
    model = model_of(form)
    full = model.bundle.manifest.full
    drafting = None if drafts is None else Speculation(4, full if drafts == "full" else None, always=True)
    rng = np.random.default_rng(7)
    depths = [None, *(depth.name for depth in model.bundle.manifest.depths)]
    vocabulary = model.bundle.manifest.model.vocab_size
    begin = rng.integers(0, vocabulary, 9).tolist()  # some prompts begin alike
    settings = Settings(rows=ROWS, chunk=CHUNK, prefix_bytes=prefix_bytes, speculation=drafting)
    scheduler = Scheduler(model.executor, settings)
    wanted, inboxes = [], []
    for index in range(9):
        prompt = [*begin[: 9 * (index % 2)], *rng.integers(0, vocabulary, rng.integers(1, 14)).tolist()]
        options = {"depth": depths[index % len(depths)], "n": 1 + (index % 4 == 3), "seed": index}
        options |= {"temperature": 0.8} if index % 3 == 2 else {}
        new_tokens = int(rng.integers(1, 9))
        inbox = Inbox()
        scheduler.add(work(model, prompt, new_tokens, inbox, **options))
        wanted.append(alone(model, prompt, new_tokens, **options))
        inboxes.append(inbox)
        for _ in range(int(rng.integers(0, 3))):
            scheduler.step()
    run(scheduler)
    assert [inbox.failure for inbox in inboxes] == [None] * len(inboxes)
    assert [[inbox.tokens[answer] for answer in sorted(inbox.tokens)] for inbox in inboxes] == wanted
    assert scheduler.cache.free == list(range(scheduler.cache.rows))
    assert scheduler.used == 0


def test_rows_of_a_depth_are_adjacent_from_the_first_row_on() -> None:
    model = model_of("skip")
    scheduler = Scheduler(model.executor, Settings(rows=6, chunk=CHUNK))
    inboxes = [Inbox() for _ in range(6)]
    for index, inbox in enumerate(inboxes):
        depth = ("full", "2", "1.5")[index % 3]
        scheduler.add(work(model, [index + 1] * 3, 4 + index, inbox, depth=depth))
    seen = set()
    decode = model.executor.decode

    def watched(cache: object, rows: list[int], *rest: object, **more: object) -> object:
        assert rows == list(range(rows[0], rows[0] + len(rows)))
        seen.add(len(rows))
        return decode(cache, rows, *rest, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.executor, "decode", watched)
        run(scheduler)
    assert seen == {1, 2}


@pytest.mark.parametrize("drafts", [None, "full"])
def test_a_known_prefix_is_copied_and_not_run_again(drafts: str | None) -> None:
    model = model_of("dense")
    drafting = None if drafts is None else Speculation(5, model.bundle.manifest.full, always=True)
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK, prefix_bytes=1 << 20, speculation=drafting))
    assert scheduler.prefixes is not None
    first, again, longer = Inbox(), Inbox(), Inbox()
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]
    scheduler.add(works := work(model, prompt, 8, first))
    run(scheduler)
    assert works.reused == 0
    scheduler.add(works := work(model, prompt, 8, again))
    run(scheduler)
    assert works.reused == 8, "two chunks; the last token's logits are needed"
    assert again.tokens == first.tokens
    # The next turn of a chat: the answer's entries are known as well, all but the part after the last whole chunk.
    turn = [*prompt, *first.tokens[0], 20, 21]
    scheduler.add(works := work(model, turn, 4, longer))
    run(scheduler)
    assert works.reused == 16
    assert [longer.tokens[0]] == alone(model, turn, 4)
    assert 0 < scheduler.prefixes.size <= 1 << 20


@pytest.mark.parametrize("form", ["dense", "skip", "mod", "radial-step"])
def test_later_chunks_are_smaller_and_cut_at_the_same_places(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "_HALF", 12)
    monkeypatch.setattr(batch, "_BLOCK", 2)
    model = model_of(form)
    scheduler = Scheduler(model.executor, Settings(rows=3, chunk=8, prefix_bytes=1 << 20))
    sizes: list[int] = []
    run_batch = model.executor.run

    def watched(cache: KvCache, given: batch.Batch) -> batch.StepResult:
        sizes.extend(map(len, given.tokens) if given.phase == "prompt" else ())
        return run_batch(cache, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.executor, "run", watched)
        prompts = [list(range(1, 30)), list(range(1, 22)), list(range(3, 14))]
        inboxes = [Inbox() for _ in prompts]
        for prompt, inbox in zip(prompts, inboxes, strict=True):
            scheduler.add(work(model, prompt, 5, inbox))
        run(scheduler)
        assert set(sizes) > {8, 4}
        scheduler.add(known := work(model, prompts[0], 5, again := Inbox()))
        run(scheduler)
    for prompt, inbox in zip(prompts, inboxes, strict=True):
        assert [inbox.tokens[0]] == alone(model, prompt, 5, chunk=scheduler.chunks)
    assert again.tokens == inboxes[0].tokens
    assert known.reused == 8 + 4 + 4 + 4 + 4 + 2 + 2


def test_the_sizes_of_chunks_fall_with_their_position() -> None:
    chunks = batch.EvenChunks(48)
    assert [chunks.size(position) for position in (0, 136, 137, 1000, 2000, 10**6)] == [48, 48, 40, 32, 24, 8]
    assert batch.EvenChunks(3).size(10**6) == 3
    for wrong in (0, True, 2.5, "8"):
        with pytest.raises(DynexportError, match="chunk: expected at least 1, found"):
            batch.EvenChunks(wrong)  # type: ignore[arg-type]


def test_prefixes_of_a_skipping_depth_are_not_those_of_a_prompt() -> None:
    """A generated token has no entries in skipped layers; in a prompt it has."""
    model = model_of("skip")
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK, prefix_bytes=1 << 20))
    first, second = Inbox(), Inbox()
    scheduler.add(work(model, [5, 6, 7], 9, first, depth=2))
    run(scheduler)
    turn = [5, 6, 7, *first.tokens[0], 8]
    scheduler.add(works := work(model, turn, 4, second, depth=2))
    run(scheduler)
    assert works.reused == 0
    assert [second.tokens[0]] == alone(model, turn, 4, depth=2)


def test_the_memory_of_prefixes_is_bounded_and_the_least_used_go_first() -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=1, chunk=CHUNK, prefix_bytes=1 << 20))
    scheduler.add(work(model, [1, 2, 3, 4, 5], 1, Inbox()))
    run(scheduler)
    assert scheduler.prefixes is not None
    part = scheduler.prefixes.size
    small = Scheduler(model.executor, Settings(rows=1, chunk=CHUNK, prefix_bytes=3 * part))
    assert small.prefixes is not None

    def reused(first: int, tokens: int) -> int:
        small.add(works := work(model, [first] * tokens, 1, Inbox()))
        run(small)
        assert small.prefixes is not None
        assert small.prefixes.size <= 3 * part
        return works.reused

    assert [reused(1, 9), reused(2, 5)] == [0, 0]  # two parts of the one row, one of the other
    assert reused(1, 5) == CHUNK
    assert reused(3, 5) == 0  # the oldest is the second part of the first row, as its first one was used
    assert [reused(2, 5), reused(1, 9)] == [CHUNK, CHUNK]


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
def test_a_cancelled_request_frees_its_rows_within_a_step(steps: int) -> None:
    model = model_of("mod")
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK))
    gone, other = Inbox(), Inbox()
    scheduler.add(works := work(model, [1] * 10, 20, gone, n=2))
    scheduler.add(work(model, [2] * 5, 3, other))
    for _ in range(steps):
        scheduler.step()
    works.cancelled = True
    scheduler.step()
    assert gone.done
    assert gone.failure == "cancelled"
    run(scheduler)
    assert [other.tokens[0]] == alone(model, [2] * 5, 3)
    assert scheduler.cache.free == list(range(scheduler.cache.rows))


def test_a_deadline_ends_a_request_that_waits_or_runs() -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=1, chunk=CHUNK))
    inboxes = [Inbox(), Inbox()]
    for inbox in inboxes:
        scheduler.add(work(model, [1, 2], 30, inbox, seconds=0.05))
    scheduler.step()
    time.sleep(0.06)
    scheduler.step()
    assert [inbox.failure for inbox in inboxes] == ["timeout", "timeout"]
    assert scheduler.idle


def test_a_long_prompt_does_not_starve_short_ones_nor_they_it() -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=3, chunk=CHUNK))
    long, order = Inbox(), []
    scheduler.add(work(model, [1] * 36, 1, long))
    for index in range(12):
        scheduler.add(work(model, [2 + index] * 4, 1, Inbox()))
    while not scheduler.idle:
        before = scheduler.waiting + scheduler.running
        scheduler.step()
        order.append((long.done, before - scheduler.waiting - scheduler.running))
    finished = [done for done, _ in order].index(True)
    assert 9 < finished < 20, "of 21 chunks, the 9 of the long prompt take turns with the others'"


def test_a_failing_row_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK))
    good, bad = Inbox(), Inbox()
    scheduler.add(work(model, [1, 2], 6, good))
    scheduler.add(work(model, [3, 4], 6, bad))
    scheduler.step()
    scheduler.step()
    victim = next(answer for answer in scheduler._running if answer.work.deliver is bad)
    decode = model.executor.decode

    def failing(cache: object, rows: list[int], *rest: object, **more: object) -> object:
        if victim in scheduler._running and victim.row in rows:
            raise RouteError("layer 1: row 1: all entries of its cache are used")
        return decode(cache, rows, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(model.executor, "decode", failing)
    run(scheduler)
    assert bad.failure == "failed"
    assert [good.tokens[0]] == alone_without(model, [1, 2], 6, monkeypatch, decode)
    assert scheduler.failures == 0, "a route that the contract forbids is no failure of the engine"


def alone_without(
    model: object, prompt: list[int], new_tokens: int, patch: pytest.MonkeyPatch, decode: object
) -> list[list[int]]:
    patch.setattr(model.executor, "decode", decode)  # type: ignore[attr-defined]
    return alone(model, prompt, new_tokens)  # type: ignore[arg-type]


def test_nan_logits_end_the_request_that_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=2, chunk=CHUNK))
    good, bad = Inbox(), Inbox()
    scheduler.add(work(model, [1, 2], 6, good))
    scheduler.add(work(model, [3, 4], 6, bad))
    scheduler.step()
    scheduler.step()
    victim = next(answer for answer in scheduler._running if answer.work.deliver is bad)
    decode = model.executor.decode

    def broken(cache: object, rows: list[int], *rest: object, **more: object) -> object:
        logits = np.array(decode(cache, rows, *rest, **more))  # type: ignore[arg-type]
        if victim in scheduler._running and victim.row in rows:
            logits[rows.index(victim.row)] = np.nan
        return logits

    monkeypatch.setattr(model.executor, "decode", broken)
    run(scheduler)
    assert bad.failure == "failed"
    assert bad.deliveries[-1].failure is not None
    assert "NaN" in bad.deliveries[-1].failure.message
    assert [good.tokens[0]] == alone_without(model, [1, 2], 6, monkeypatch, decode)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "n", "message"),
    [
        ([1] * 30, 20, 1, "prompt: expected at most 40 tokens together with the answer, found 30 and 20 new ones"),
        ([1] * 20, 10, 2, "prompt: expected at most 25 tokens together with the answer, found 20 and 10 new ones"),
        ([1], 1, 4, "n: expected at most 3 answers, found 4"),
    ],
)
def test_requests_that_can_never_run_are_refused(prompt: list[int], new_tokens: int, n: int, message: str) -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=3, reserved=50))
    with pytest.raises(DynexportError, match=message):
        scheduler.check(work(model, prompt, new_tokens, Inbox(), n=n))


def test_reserved_tokens_bound_how_many_requests_run() -> None:
    model = model_of("dense")
    scheduler = Scheduler(model.executor, Settings(rows=3, chunk=CHUNK, reserved=20))
    inboxes = [Inbox() for _ in range(3)]
    for inbox in inboxes:
        scheduler.add(work(model, [1] * 4, 6, inbox))
    scheduler.step()
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    run(scheduler)
    assert all(inbox.tokens == inboxes[0].tokens for inbox in inboxes)
