"""Requests for a scheduler, and what they give alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from forms import executor_of

from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.submit import make_work
from dynexport.runtime.serving.work import Delivery, Work

CHUNK = 4


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


@cache
def model_of(form: str) -> Model:
    """Return a model whose executor the tests of execution share."""
    executor = executor_of(form)
    model = Model(executor.bundle, threads=1)
    model.executor = executor
    return model


def work(model: Model, prompt: list[int], new_tokens: int, inbox: Inbox, **options: Any) -> Work:
    """Return a request; ``options`` are n, depth and fields of Sampling."""
    n, depth, seconds = options.pop("n", 1), options.pop("depth", None), options.pop("seconds", None)
    sampling = Sampling(**options)
    return make_work(
        model, prompt, max_new_tokens=new_tokens, n=n, depth=depth, sampling=sampling, seconds=seconds, deliver=inbox
    )


def run(scheduler: Scheduler) -> None:
    """Run a scheduler until nothing is left."""
    for _ in range(2000):
        if scheduler.idle:
            return
        scheduler.step()
    raise AssertionError("the scheduler does not come to an end")


def alone(model: Model, prompt: list[int], new_tokens: int, **options: Any) -> list[list[int]]:
    """Return the tokens of each answer without a scheduler."""
    n, depth, chunk = options.pop("n", 1), options.pop("depth", None), options.pop("chunk", CHUNK)
    sampling = Sampling(**options)
    found = model.choices(prompt, n, max_new_tokens=new_tokens, sampling=sampling, depth=depth, chunk=chunk)
    return [each.ids for each in found]
