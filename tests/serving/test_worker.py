"""A worker runs requests of many threads, refuses what it has no room for, and ends them all when it stops."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from requests_of_tests import CHUNK, Inbox, alone, model_of, work

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import answers, answers_async, make_work
from dynexport.runtime.serving.worker import Closed, QueueFull, Worker


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker(model_of("skip"), Settings(rows=3, chunk=CHUNK, queue=8))
    worker.start()
    yield worker
    worker.close()


def tokens(worker: Worker, prompt: list[int], new_tokens: int, **options: object) -> list[int]:
    found = []
    for delivery in answers(worker, make_work(worker.model, prompt, max_new_tokens=new_tokens, **options)):  # type: ignore[arg-type]
        assert delivery.failure is None
        found += [answered.piece.token for answered in delivery.answered]
    return found


def test_many_threads_get_the_tokens_that_they_get_alone(worker: Worker) -> None:
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = tokens(worker, [index + 1] * (1 + index), 5, depth=("full", "2")[index % 2])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert [found[index]] == alone(worker.model, [index + 1] * (1 + index), 5, depth=("full", "2")[index % 2])


def test_a_prompt_without_tokens_is_refused_before_it_is_submitted(worker: Worker) -> None:
    with pytest.raises(DynexportError, match="prompt: expected at least one token, found none"):
        make_work(worker.model, [])
    assert not worker.problem


def test_an_event_loop_gets_the_same(worker: Worker) -> None:
    async def ask(first: int) -> list[int]:
        work = make_work(worker.model, [first, 2, 3], max_new_tokens=6)
        return [
            answered.piece.token async for delivery in answers_async(worker, work) for answered in delivery.answered
        ]

    async def both() -> list[list[int]]:
        return await asyncio.gather(ask(4), ask(5))

    assert asyncio.run(both()) == [alone(worker.model, [first, 2, 3], 6)[0] for first in (4, 5)]


def test_a_reader_that_stops_early_cancels(worker: Worker) -> None:
    stream = answers(worker, make_work(worker.model, [1, 2], max_new_tokens=38))
    next(stream)
    stream.close()
    assert tokens(worker, [3], 2) == alone(worker.model, [3], 2)[0]
    assert worker.scheduler.cache.free == list(range(worker.scheduler.cache.rows))


def test_a_full_queue_refuses(worker: Worker) -> None:
    held = threading.Event()
    step = worker.scheduler.step
    worker.scheduler.step = lambda: (held.wait(), step())[1]  # type: ignore[method-assign]
    try:
        with pytest.raises(QueueFull, match="queue: expected fewer than 8 waiting requests, found it full"):
            for _ in range(10):  # the worker may have taken some of them from the inbox
                worker.submit(work(worker.model, [1], 2, Inbox()))
    finally:
        held.set()


def test_a_stopping_worker_lets_requests_finish_and_refuses_others(worker: Worker) -> None:
    inbox = Inbox()
    worker.submit(work(worker.model, [1, 2], 20, inbox))
    worker.close(seconds=30)
    assert inbox.failure is None
    assert len(inbox.tokens[0]) == 20
    with pytest.raises(Closed, match="server: expected a running one, found it stopping"):
        worker.submit(work(worker.model, [1], 1, Inbox()))
    assert worker.problem == "the server stops"


def test_a_worker_that_stops_at_once_ends_its_requests(worker: Worker) -> None:
    inbox = Inbox()
    worker.submit(work(worker.model, [1, 2], 38, inbox))
    worker.close()
    assert inbox.failure in ("closed", None)
    assert inbox.done


def test_an_unexpected_error_ends_the_thread_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    worker = Worker(model_of("skip"), Settings(rows=3, chunk=CHUNK), on_failure=lines.append)

    def broken() -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(worker.scheduler, "step", broken)
    worker.start()
    inbox = Inbox()
    worker.submit(work(worker.model, [1], 2, inbox))
    worker._thread.join(10)
    assert inbox.failure == "failed"
    assert len(lines) == 1
    assert "the worker stopped: MemoryError: no more" in worker.problem
    with pytest.raises(Closed, match="the worker stopped"):
        worker.submit(work(worker.model, [1], 2, Inbox()))


def test_an_engine_that_keeps_failing_makes_the_worker_unready(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*anything: object, **more: object) -> object:
        raise DynexportError("decoder.onnx: ONNX Runtime failed in a step: no memory")

    assert worker.problem == ""
    with monkeypatch.context() as patch:
        patch.setattr(worker.model.executor, "run", failing)
        for _ in range(3):
            (delivery,) = answers(worker, make_work(worker.model, [1], max_new_tokens=2))
            assert delivery.failure is not None
            assert "no memory" in delivery.failure.message
    assert worker.problem == "the last 3 requests failed"
    assert tokens(worker, [3], 2) == alone(worker.model, [3], 2)[0]
    assert worker.problem == ""
