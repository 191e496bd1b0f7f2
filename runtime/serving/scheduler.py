"""Run many requests on the rows of one cache: which start, whose prompt goes on, who gets a token."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from dynexport.runtime.bundle.errors import DynexportError, RouteError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.execution.batch import Batch, EvenChunks
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.generation.drafts import KnownTokens
from dynexport.runtime.generation.request import Piece
from dynexport.runtime.generation.sampler import NoTokenLeft
from dynexport.runtime.generation.speculation import MOST_DRAFTS, Speculator, taken
from dynexport.runtime.serving.prefix_store import PrefixStore
from dynexport.runtime.serving.rows import arrange
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.watch import Unwatched, Watch
from dynexport.runtime.serving.work import Answer, Answered, Delivery, Failure, Reason, Work

Array = np.ndarray


class Scheduler:
    """Runs requests step by step, in one thread.

    A step starts requests that fit, runs one chunk of one prompt, and then a decode step of all rows whose prompts have
    run. So the others wait for one chunk at most, and a request that is cancelled frees its rows within a step.

    Args:
        executor: runs the bundle's graphs.
        settings: sizes and bounds.
        watch: receives what happens.

    Attributes:
        cache: the rows of all running requests.
        rows: most answers that run at a time.
        tokens: most tokens of a request, prompt and answer.
        chunks: how prompts are cut.
        prefixes: earlier prompts' entries; None if they are not kept.
        failures: number of consecutive requests that the engine failed.

    Raises:
        DynexportError: for a cache that does not fit into memory or the engines' limits.
    """

    def __init__(self, executor: Executor, settings: Settings, watch: Watch | None = None) -> None:
        self.settings, self._executor, self._watch = settings, executor, watch or Unwatched()
        self.tokens = min(settings.tokens or executor.manifest.model.max_length, executor.manifest.model.max_length)
        limits = executor.limits
        self.chunks = EvenChunks(min(settings.chunk, limits.prompt or settings.chunk))
        rows = settings.rows if limits.rows is None else min(settings.rows, limits.rows)
        spare = limits.rows is None or rows < limits.rows  # one more row to exchange two others
        self.cache = executor.cache(rows + spare, self.tokens, record=bool(executor.reader.rows))
        self.rows = rows
        self._reserved = settings.reserved or rows * self.tokens
        self._shared = not limits.whole_prompts and not limits.compete  # whether a prefix may be copied
        self.prefixes = PrefixStore(settings.prefix_bytes) if settings.prefix_bytes and self._shared else None
        self._alone = limits.compete  # a row's tokens must not depend on the others
        drafts = settings.speculation
        self._speculator = None if drafts is None else Speculator.of(executor, drafts)
        self._waiting: deque[Work] = deque()
        self._running: list[Answer] = []
        self._turn = self.failures = 0
        self._out: dict[Work, Delivery] = {}

    @property
    def waiting(self) -> int:
        """Number of requests that wait for rows."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers that hold rows."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """True if no request waits or runs."""
        return not self._waiting and not self._running

    @property
    def used(self) -> float:
        """Share of the cache's tokens that are in use."""
        return float(self.cache.positions.sum()) / (self.rows * self.tokens)

    def check(self, work: Work) -> None:
        """Raise DynexportError for a request that can never run: too many tokens, too many answers."""
        limits = self._executor.limits
        if limits.whole_prompts and limits.prompt is not None and len(work.prompt) > limits.prompt:
            raise DynexportError(
                f"prompt: expected at most {limits.prompt} tokens, as prompts of this model are never cut, found "
                f"{len(work.prompt)}"
            )
        if len(work.requests) > self.rows:
            raise DynexportError(f"n: expected at most {self.rows} answers, found {len(work.requests)}")
        total = len(work.prompt) + work.new_tokens
        if total > self.tokens or work.reserved > self._reserved:
            most = min(self.tokens, self._reserved // len(work.requests))
            raise DynexportError(
                f"prompt: expected at most {most} tokens together with the answer, found {len(work.prompt)} and "
                f"{work.new_tokens} new ones"
            )

    def add(self, work: Work) -> None:
        """Add a checked request to the queue."""
        self._waiting.append(work)

    def step(self) -> None:
        """Run one step and deliver its tokens."""
        begun = time.perf_counter()
        self._end_unwanted(time.monotonic())
        self._admit()
        self._run_prompt()
        self._decode()
        self._deliver()
        self._watch.stepped(time.perf_counter() - begun)

    def end_all(self, failure: Failure) -> None:
        """End all requests, waiting and running."""
        for work in [*self._waiting, *{answer.work for answer in self._running}]:
            self._end_work(work, failure)
        self._deliver()

    # Starting and ending

    def _end_unwanted(self, now: float) -> None:
        works = [*self._waiting, *dict.fromkeys(answer.work for answer in self._running)]
        for work in works:
            if work.cancelled:
                self._end_work(work, Failure("cancelled", "the client has cancelled the request"))
            elif work.deadline is not None and now >= work.deadline:
                self._end_work(work, Failure("timeout", "the request reached its time limit"))

    def _admit(self) -> None:
        """Start waiting requests in order of arrival, while rows and reserved tokens last."""
        while self._waiting:
            work = self._waiting[0]
            held = sum(work.reserved for work in {answer.work for answer in self._running})
            if len(self._running) + len(work.requests) > self.rows or held + work.reserved > self._reserved:
                return
            self._waiting.popleft()
            root = PrefixStore.root(work.depth.prompt)
            rows = self.cache.acquire(len(work.requests))
            zero = np.zeros(len(self.cache.lengths), np.int64)
            chain = None if self.prefixes is None else root
            answers = [Answer(work, *pair, zero, chain) for pair in zip(work.requests, rows, strict=True)]
            self._running += answers
            self._reuse(answers[0])
            self._watch.started(work, time.monotonic() - work.arrived)

    def _reuse(self, answer: Answer) -> None:
        """Copy the entries of the longest known prefix into an answer's row."""
        if self.prefixes is None or answer.chain is None:
            return
        for key, saved in list(self.prefixes.longest(answer.chain, answer.work.prompt, self.chunks)):
            self.cache.restore(answer.row, saved)
            answer.chain = key
        answer.done = answer.saved = answer.work.reused = int(self.cache.positions[answer.row])
        answer.entries = self.cache.lengths[:, answer.row].copy()

    def _end_work(self, work: Work, failure: Failure) -> None:
        """End a request without the rest of its answers."""
        if work in self._waiting:
            self._waiting.remove(work)
            self._watch.dropped(work, failure.reason)
        for answer in [answer for answer in self._running if answer.work is work]:
            self._release(answer, failure.reason)
        out = self._out.setdefault(work, Delivery(work))
        out.failure, out.done = failure, True

    def _fail(self, answer: Answer, error: DynexportError, *, by_engine: bool = True) -> None:
        """End a request that failed. A route that the contract forbids is not the engine's failure."""
        self.failures += by_engine and not isinstance(error, RouteError)
        self._end_work(answer.work, Failure("failed", str(error)))

    def _release(self, answer: Answer, reason: Reason | str) -> None:
        decided = [] if self.cache.logs is None else self.cache.logs[answer.row]
        self._watch.ended(answer, reason, decided, int(self.cache.overflow[:, answer.row].sum()))
        self._running.remove(answer)
        self.cache.release(answer.row)

    # Prompts

    def _run_prompt(self) -> None:
        """Run a chunk of one prompt; of the first answer of a request only, where the others may copy its row."""
        answer = self._next_prompt()
        if answer is None:
            return
        prompt, stop = answer.work.prompt, len(answer.work.prompt)
        if not self._executor.limits.whole_prompts:
            stop = min(stop, answer.done + self.chunks.size(answer.done))
        ids = prompt[answer.done : stop]
        last = stop == len(prompt)
        try:
            logits = self._timed_prompt(answer, ids, last)
        except DynexportError as error:
            self._fail(answer, error)
            return
        answer.done = stop
        self._save(answer)
        if not last:
            return
        answers = [answer]
        if self._shared:
            answers = [other for other in self._running if other.work is answer.work]
            self._copy(answer, answers[1:])
        for other in answers:
            other.ready = True
            if self._speculator is not None:
                other.known, other.acceptance = KnownTokens(prompt.tolist()), self._speculator.acceptance()
        self._push(answers, [taken(other, logits[None]) for other in answers])

    def _next_prompt(self) -> Answer | None:
        """Return whose prompt goes on: in turn the one that came first, and the one with the fewest tokens left."""
        starting = list(self._starting())
        if not starting:
            return None
        self._turn += 1
        return starting[0] if self._turn % 2 else min(starting, key=lambda answer: answer.left)

    def _starting(self) -> Iterator[Answer]:
        seen: set[int] = set()
        for answer in self._running:
            if not answer.ready and not (self._shared and id(answer.work) in seen):
                seen.add(id(answer.work))
                yield answer

    def _timed_prompt(self, answer: Answer, ids: Array, last: bool) -> Array:
        """Run a chunk and return the logits of its last token if it is the last chunk, float32 [vocab]."""
        wanted = [np.array([len(ids) - 1] if last else [], np.int64)]
        batch = Batch([answer.row], [ids], "prompt", answer.depth, wanted, chunk=len(ids))
        begun = time.perf_counter()
        found = self._executor.run(self.cache, batch).logits[0]
        self._watch.ran(len(ids), 1, time.perf_counter() - begun)
        return found[-1] if last else found

    def _copy(self, answer: Answer, others: Sequence[Answer]) -> None:
        """Copy a row whose prompt has run to the other answers of its request."""
        for other in others:
            self.cache.copy_prefix(self.cache.mark(answer.row), other.row)
            other.done, other.chain, other.saved, other.entries = answer.done, None, answer.saved, answer.entries

    # Decode steps

    def _decode(self) -> None:
        """Run a decode step of all answers whose prompts have run, a call for each depth."""
        groups = self._groups()
        if not groups:
            return
        if not self._alone:
            arrange(self.cache, [*groups, [answer for answer in self._running if not answer.ready]])
        for group in groups:
            for rows in [[answer] for answer in group] if self._alone else [sorted(group, key=lambda a: a.row)]:
                self._decode_rows(rows)

    def _groups(self) -> list[list[Answer]]:
        """Return the answers that get a token, by depth."""
        groups: dict[str, list[Answer]] = {}
        for answer in self._running:
            if answer.ready and answer.tokens:
                groups.setdefault(answer.depth.name, []).append(answer)
        return list(groups.values())

    def _decode_rows(self, answers: Sequence[Answer]) -> None:
        """Run a decode step of some answers; if it fails, each alone, and end those that fail."""
        try:
            found, seconds = self._stepped(answers)
        except DynexportError as error:
            if len(answers) == 1:
                self._fail(answers[0], error)
                return
            for answer in answers:
                if answer in self._running:
                    self._decode_rows([answer])
            return
        self._watch.ran(0, len(answers), seconds)
        self._push(answers, found)

    def _stepped(self, answers: Sequence[Answer]) -> tuple[list[list[Piece] | DynexportError], float]:
        """Run a decode step of some answers and let them take their tokens; also return the executor's seconds."""
        if self._speculator is not None:
            for answer in answers:
                # The entries of a whole chunk are saved, so no step goes beyond its end.
                room = answer.saved + self.chunks.size(answer.saved) - int(self.cache.positions[answer.row])
                answer.most_drafts = MOST_DRAFTS if answer.chain is None else room - 1
            return self._speculator.step(self.cache, answers), self._speculator.engine_seconds
        rows, tokens = [answer.row for answer in answers], [answer.token for answer in answers]
        depths: list[Depth] = [answer.depth for answer in answers]
        begun = time.perf_counter()
        logits = self._executor.decode(self.cache, rows, tokens, depths, lasting=False)
        seconds = time.perf_counter() - begun
        return [taken(answer, values[None]) for answer, values in zip(answers, logits, strict=True)], seconds

    def _push(self, answers: Sequence[Answer], found: Sequence[list[Piece] | DynexportError]) -> None:
        """Deliver the tokens that some answers have taken and end those that are complete."""
        now = time.monotonic()
        for answer, pieces in zip(answers, found, strict=True):
            if answer not in self._running:  # another answer of its request has failed
                continue
            if isinstance(pieces, DynexportError):
                self._fail(answer, pieces, by_engine=not isinstance(pieces, NoTokenLeft))
                continue
            out = self._out.setdefault(answer.work, Delivery(answer.work))
            first = len(answer.tokens) == len(pieces)
            for place, piece in enumerate(pieces):
                out.answered.append(Answered(piece, answer.layers(self.cache, len(pieces) - place)))
                self._watch.answered(answer, now - (answer.work.arrived if first else answer.latest), first=first)
                answer.latest, first = now, False
            self._save(answer)
            if (reason := pieces[-1].finish_reason) is not None:
                self.failures = 0
                self._release(answer, reason)
                out.done = all(other.work is not answer.work for other in self._running)

    def _save(self, answer: Answer) -> None:
        """Keep the entries of an answer's latest tokens for other prompts, when another chunk is complete."""
        seen, chunk = int(self.cache.positions[answer.row]), self.chunks.size(answer.saved)
        if self.prefixes is None or answer.chain is None or seen - answer.saved < chunk:
            return
        generated = seen > len(answer.work.prompt)
        if seen - answer.saved != chunk or (generated and answer.depth.keep != answer.depth.prompt):
            answer.chain = None  # its tokens ran in other layers than those of a prompt would
            return
        key = PrefixStore.key(answer.chain, answer.token_ids(answer.saved, seen))
        if key not in self.prefixes:
            self.prefixes.add(answer.chain, key, self.cache.save(answer.row, answer.entries, answer.saved))
        answer.chain, answer.saved, answer.entries = key, seen, self.cache.lengths[:, answer.row].copy()

    def _deliver(self) -> None:
        out, self._out = self._out, {}
        for work, delivery in out.items():
            work.deliver(delivery)


__all__ = ["Scheduler"]
