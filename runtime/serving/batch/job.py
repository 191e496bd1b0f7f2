"""Answer a file of requests with one worker, several requests at a time."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pydantic import ValidationError

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import MANIFEST
from dynexport.runtime.serving.batch.answers import Answers
from dynexport.runtime.serving.batch.lines import Line
from dynexport.runtime.serving.batch.requests import BadLine, BatchRequest, Requests, parse_request
from dynexport.runtime.serving.http import asking
from dynexport.runtime.serving.http.answering import Answer
from dynexport.runtime.serving.http.asking import Asked
from dynexport.runtime.serving.http.errors import ApiError, of_error, of_failure, of_validation
from dynexport.runtime.serving.http.protocol import MOST_PROMPTS, ChatBody, CompletionBody
from dynexport.runtime.serving.http.served import Directory, Served
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.work import Delivery, Failure, Work
from dynexport.runtime.serving.worker import Worker


@dataclass
class Totals:
    """Counts of a run.

    Attributes:
        requests: number of requests in the file.
        before: number of requests that earlier runs have answered.
        answered: number of requests that this run answered.
        errors: number of requests that this run answered with an error.
        tokens: number of tokens that this run generated.
        seconds: duration of this run.
    """

    requests: int
    before: int
    answered: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0


def batch_settings(rows: int, tokens: int | None, prefix_bytes: int) -> Settings:
    """Return the settings of a worker for a batch: enough requests wait to keep its rows busy.

    Args:
        rows: as for ``Settings``.
        tokens: as for ``Settings``.
        prefix_bytes: as for ``Settings``.
    """
    return Settings(rows, tokens, queue=2 * rows + MOST_PROMPTS, prefix_bytes=prefix_bytes)


def maker_of(bundle: Bundle, settings: Settings, backend: str) -> str:
    """Return the hash, hexadecimal, of what the texts of the answers depend on besides the requests."""
    digest = hashlib.sha256(bundle.read(MANIFEST))
    digest.update(f"{backend} {settings.chunk} {settings.tokens}".encode())
    return digest.hexdigest()


def answer_file(
    source: Path,
    target: Path,
    name: str,
    worker: Worker,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Totals:
    """Answer all requests of a file that are not answered yet.

    Answers are written in the order in which they are finished. A request that cannot be answered gets an error. The
    memory needed grows by 33 bytes per line.

    Args:
        source: the file of requests.
        target: the file of answers; one that an earlier run has begun is completed.
        name: the model's name in the requests; name@depth chooses a depth.
        worker: the model's worker, not started; its settings are those of ``batch_settings``.
        progress: called with the number of requests done and of all requests.

    Raises:
        DynexportError: for a file that cannot be read or written, an id that is there twice, an output of other
            requests, another bundle or other options, or a worker that stops. Finished answers are then in the file.
    """
    begun = time.monotonic()
    requests = Requests.scan(source)
    maker = maker_of(worker.model.bundle, worker.settings, worker.model.executor.backend)
    with closing(Answers(target, requests, maker)) as answers:
        job = _Job(name, worker, requests, answers, progress)
        worker.start()
        try:
            job.run()
        finally:
            worker.close()
    job.totals.seconds = time.monotonic() - begun
    return job.totals


@dataclass
class _Running:
    """A request that the worker runs, and its answer so far."""

    number: int
    custom_id: str
    answer: Answer
    works: Sequence[Work]
    left: int
    failure: Failure | None = None

    def add(self, delivery: Delivery) -> None:
        """Add what was delivered; a failure ends all works of the request."""
        self.left -= delivery.done
        if self.failure is None:
            self.failure = delivery.failure
            self.answer.add(delivery)
        if self.failure is not None:
            for work in self.works:
                work.cancelled = True


class _Job:
    """The requests of a file on their way through a worker."""

    def __init__(
        self,
        name: str,
        worker: Worker,
        requests: Requests,
        answers: Answers,
        progress: Callable[[int, int], None],
    ) -> None:
        self._directory = Directory({name: Served.of(name, worker)})
        self._worker, self._requests, self._answers, self._progress = worker, requests, answers, progress
        self._inbox: SimpleQueue[tuple[_Running, Delivery]] = SimpleQueue()
        self._most, self._works = 2 * worker.scheduler.rows, 0
        self.totals = Totals(requests.count, answers.count)

    def run(self) -> None:
        """Answer the requests."""
        self._progress(self._answers.count, self._requests.count)
        for line in self._requests.lines():
            if not self._answers.has(line.number):
                self._start(line)
        while self._works:
            self._collect()

    def _start(self, line: Line) -> None:
        """Submit the request on a line when there is room for it, or write what is wrong with it."""
        try:
            request = parse_request(line)
        except BadLine as error:
            problem = {"code": "invalid_line", "message": str(error)}
            self._write(line.number, error.custom_id, error=problem)
            return
        try:
            kind, asked = self._asked(request)
        except ApiError as error:
            self._refuse(line.number, request.custom_id, error)
            return
        while self._works and self._works + len(asked.works) > self._most:
            self._collect()
        running = _Running(line.number, request.custom_id, Answer(kind, asked), asked.works, len(asked.works))
        for work in asked.works:
            work.deliver = partial(self._receive, running)
            self._worker.submit(work)
            self._works += 1

    def _asked(self, request: BatchRequest) -> tuple[Any, Asked]:
        """Return the kind of a request and what it asks for, as the server reads it. Raises ApiError if it is wrong."""
        try:
            if request.url == "/v1/completions":
                found = (
                    "completion",
                    asking.completion(self._directory, CompletionBody.model_validate(request.body), None),
                )
            else:
                found = "chat", asking.chat(self._directory, ChatBody.model_validate(request.body), None)
        except ValidationError as error:
            raise of_validation(error, request.body) from error
        except DynexportError as error:
            raise of_error(error) from error
        if found[1].stream:
            raise ApiError(400, "stream: expected false in a batch, found true", param="stream")
        return found

    def _receive(self, running: _Running, delivery: Delivery) -> None:
        self._inbox.put((running, delivery))

    def _collect(self) -> None:
        """Wait for the next delivery, and write the answer that it completes."""
        running, delivery = self._inbox.get()
        running.add(delivery)
        self._works -= delivery.done
        if running.left:
            return
        if running.failure is None:
            body = running.answer.body()
            self.totals.tokens += body["usage"]["completion_tokens"]
            self._write(running.number, running.custom_id, _response(200, body))
        elif self._worker.problem:  # it is not the request's
            raise DynexportError(f"{running.failure.message}; run the command again to go on")
        else:
            self._refuse(running.number, running.custom_id, of_failure(running.failure))

    def _refuse(self, number: int, custom_id: str, error: ApiError) -> None:
        self._write(number, custom_id, _response(error.status, error.body))

    def _write(
        self, number: int, custom_id: str | None, response: dict[str, Any] | None = None, error: Any = None
    ) -> None:
        self._answers.append(number, custom_id, response, error)
        self.totals.answered += 1
        self.totals.errors += response is None or response["status_code"] != 200
        self._progress(self._answers.count, self._requests.count)


def _response(status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}


__all__ = ["Totals", "answer_file", "batch_settings", "maker_of"]
