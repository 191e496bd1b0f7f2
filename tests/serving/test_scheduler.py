"""A scheduler's requests give, each, the tokens that the model gives them alone, whatever else runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from forms import FORMS, executor_of

from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import make_work
from dynexport.runtime.serving.work import Delivery, Work

CHUNK, ROWS = 4, 3


@dataclass
class Inbox:
    """What was delivered for one request: the tokens of each answer."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)

    def __call__(self, delivery: Delivery) -> None:
        assert not self.done, "nothing comes after the last delivery"
        self.deliveries.append(delivery)
        for answered in delivery.answered:
            self.tokens.setdefault(answered.piece.row, []).append(answered.piece.token)

    @property
    def done(self) -> bool:
        return bool(self.deliveries) and self.deliveries[-1].done

    @property
    def failure(self) -> str | None:
        last = self.deliveries[-1].failure
        return last and last.reason


def model_of(form: str) -> Model:
    executor = executor_of(form)
    model = Model(executor.bundle, threads=1)
    model.executor = executor
    return model


def work(model: Model, prompt: list[int], new_tokens: int, inbox: Inbox, **options: Any) -> Work:
    n, depth = options.pop("n", 1), options.pop("depth", None)
    return make_work(
        model, prompt, max_new_tokens=new_tokens, n=n, depth=depth, sampling=Sampling(**options), deliver=inbox
    )


def run(scheduler: Scheduler) -> None:
    for _ in range(2000):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def alone(model: Model, prompt: list[int], new_tokens: int, **options: Any) -> list[list[int]]:
    n, depth = options.pop("n", 1), options.pop("depth", None)
    sampling = Sampling(**options)
    found = model.choices(prompt, n, max_new_tokens=new_tokens, sampling=sampling, depth=depth, chunk=CHUNK)
    return [each.ids for each in found]


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20], ids=["no prefixes", "prefixes"])
@pytest.mark.parametrize("form", FORMS)
def test_every_request_gives_the_tokens_that_it_gives_alone(form: str, prefix_bytes: int) -> None:
    model = model_of(form)
    rng = np.random.default_rng(7)
    depths = [None, *(depth.name for depth in model.bundle.manifest.depths)]
    vocabulary = model.bundle.manifest.model.vocab_size
    begin = rng.integers(0, vocabulary, 9).tolist()  # some prompts begin alike
    scheduler = Scheduler(model.executor, Settings(rows=ROWS, chunk=CHUNK, prefix_bytes=prefix_bytes))
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
