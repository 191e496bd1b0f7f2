"""The thread that runs a scheduler, and the way for other threads to submit requests to it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.model import Model
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.watch import Unwatched, Watch
from dynexport.runtime.serving.work import Failure, Work

# Consecutive failures of the engine after which a worker is not ready.
_FAILURES = 3


class QueueFull(DynexportError):
    """A request was refused because as many as may wait are waiting."""


class Closed(DynexportError):
    """A request was refused because the server stops."""


class Worker:
    """Runs the requests of one model in a thread of its own.

    Args:
        model: the loaded bundle.
        settings: sizes and bounds.
        watch: receives what happens, in the worker's thread.
        on_failure: receives one line when the thread ends by an error.

    Raises:
        DynexportError: as for ``Scheduler``.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        watch: Watch | None = None,
        on_failure: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.model, self.settings = model, settings
        self.scheduler = Scheduler(model.executor, settings, watch)
        self._watch, self._on_failure = watch or Unwatched(), on_failure
        self._inbox: SimpleQueue[Work | None] = SimpleQueue()
        self._submitting = threading.Lock()
        self._closing, self._deadline = False, math.inf
        self._stopped = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="dynexport-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def problem(self) -> str:
        """One line that says why the worker is not ready; empty if it is."""
        if self._problem or self._closing:
            return self._problem or "the server stops"
        if self.scheduler.failures >= _FAILURES:
            return f"the last {self.scheduler.failures} requests failed"
        return "" if self._thread.is_alive() else "the worker has not started"

    @property
    def dead(self) -> bool:
        """True if the thread has ended by an error: only another process can serve the model."""
        return bool(self._problem)

    @property
    def waiting(self) -> int:
        """Number of requests that wait for rows."""
        return self._inbox.qsize() + self.scheduler.waiting

    def submit(self, work: Work) -> None:
        """Queue a request; its deliveries come in the worker's thread.

        Raises:
            QueueFull: when as many as may wait are waiting.
            Closed: when the server stops.
            DynexportError: for a request that can never run.
        """
        self.scheduler.check(work)
        with self._submitting:
            if self._closing or self._problem:
                raise Closed(self._problem or "server: expected a running one, found it stopping; try another one")
            if self.waiting >= self.settings.queue:
                self._watch.refused()
                raise QueueFull(f"queue: expected fewer than {self.settings.queue} waiting requests, found it full")
            work.arrived = time.monotonic()
            self._inbox.put(work)

    def close(self, seconds: float = 0.0) -> None:
        """Refuse further requests, let the others finish for some seconds, then end them and the thread.

        Args:
            seconds: how long running and waiting requests may go on.
        """
        with self._submitting:
            self._closing = True
        self._inbox.put(None)
        if self._thread.is_alive():
            self._stopped.wait(seconds)
            self._deadline = time.monotonic()
            self._inbox.put(None)
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._done():
                self._receive()
                self.scheduler.step()
            message = "the server stops"
        except BaseException as error:  # the thread's last words; requests must not hang
            message = self._problem = f"{self.model.bundle.path}: the worker stopped: {type(error).__name__}: {error}"
            self._on_failure(message)
        finally:
            self._stopped.set()
        self._end(Failure("closed" if not self._problem else "failed", message))

    def _done(self) -> bool:
        """Return whether the thread ends: it was told to, and nothing is left or its time is over."""
        if not self._closing:
            return False
        idle = self.scheduler.idle and self._inbox.empty()
        return idle or time.monotonic() >= self._deadline

    def _receive(self) -> None:
        """Take all submitted requests; wait for one if nothing runs."""
        wait = self.scheduler.idle
        while True:
            try:
                work = self._inbox.get(block=wait)
            except Empty:
                return
            if work is None:
                return
            self.scheduler.add(work)
            wait = False

    def _end(self, failure: Failure) -> None:
        with self._submitting:
            self._closing = True
        while not self._inbox.empty():
            if (work := self._inbox.get()) is not None:
                self.scheduler.add(work)
        self.scheduler.end_all(failure)


__all__ = ["Closed", "QueueFull", "Worker"]
