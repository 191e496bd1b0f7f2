"""Submit a prompt to a worker, and iterate over what it delivers, in a thread or in an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from dynexport.runtime.bundle.checks import checked_count, checked_ids
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.model import Model, Prompt, WantedDepth
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.work import Delivery, Work
from dynexport.runtime.serving.worker import Worker

_GREEDY = Sampling()
# Most answers to one prompt.
MOST_CHOICES = 128


def make_work(
    model: Model,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    n: int = 1,
    sampling: Sampling = _GREEDY,
    depth: WantedDepth = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    schema: Mapping[str, Any] | None = None,
    stop_token_ids: Sequence[int] = (),
    seconds: float | None = None,
    deliver: Callable[[Delivery], None] = lambda delivery: None,
) -> Work:
    """Return a request to submit.

    Args:
        model: the worker's model.
        prompt: text or token ids.
        max_new_tokens: most tokens of an answer.
        n: number of answers, each with its own random draws.
        sampling: the sampling options of all answers.
        depth: a ratio or name that the bundle declares, as for ``Model.generate``.
        stop: strings that end an answer; they are not part of its text.
        chat: true for an answer in a chat, which also ends at the manifest's ``turn_end`` tokens.
        schema: a JSON schema that every answer fulfils, as for ``Model.generate``.
        stop_token_ids: ids that end an answer, as for ``Model.generate``.
        seconds: time limit, waiting included; None for no limit.
        deliver: receives the deliveries; ``answers`` and ``answers_async`` set their own.

    Raises:
        DynexportError: for an argument of another type or out of its range.
    """
    tokens = model.text.encode(prompt) if isinstance(prompt, str) else prompt
    ids = checked_ids("prompt", tokens, model.bundle.manifest.model.vocab_size)
    new_tokens, chosen = checked_count("max_new_tokens", max_new_tokens), model.depth(depth)
    requests = [
        model.request(
            [ids],
            len(ids),
            index=index,
            depth=chosen,
            sampling=sampling,
            max_new_tokens=new_tokens,
            stop=stop,
            chat=chat,
            schema=schema,
            stop_token_ids=stop_token_ids,
        )
        for index in range(checked_count("n", n, 1, MOST_CHOICES))
    ]
    return Work(ids, requests, new_tokens, deliver, None if seconds is None else time.monotonic() + seconds)


def wanted_depth(model: Model, wanted: WantedDepth) -> Depth:
    """Return the depth that a request asks for.

    Args:
        model: the worker's model.
        wanted: as for ``Model.generate``.

    Raises:
        DynexportError: for one that the bundle does not declare; the bundle's path, which is not the client's business,
            is not in the message.
    """
    try:
        return model.depth(wanted)
    except DynexportError as error:
        manifest = model.bundle.manifest
        names = ", ".join(depth.name for depth in (manifest.full, *manifest.depths))
        raise DynexportError(f"depth: expected one of {names}, found {wanted!s:.80}") from error


def answers(worker: Worker, *works: Work) -> Generator[Delivery, None, None]:
    """Submit requests and yield their deliveries as they come; a caller that stops early closes it and cancels them.

    Raises:
        DynexportError: as for ``Worker.submit``; a request that ends without an answer has a ``failure`` instead.
    """
    inbox, left = SimpleQueue[Delivery](), len(works)
    try:
        for work in works:
            work.deliver = inbox.put
            worker.submit(work)
        while left:
            delivery = inbox.get()
            left -= delivery.done
            yield delivery
    finally:
        for work in works:
            work.cancelled = True


async def answers_async(worker: Worker, *works: Work) -> AsyncGenerator[Delivery, None]:
    """Submit requests and yield their deliveries, as they come, in the running event loop.

    A caller that stops early closes the generator, which cancels the requests. Errors as for ``answers``.
    """
    loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Delivery]()
    left = len(works)
    try:
        for work in works:
            work.deliver = lambda delivery: _send(loop, inbox, delivery)
            worker.submit(work)
        while left:
            delivery = await inbox.get()
            left -= delivery.done
            yield delivery
    finally:
        for work in works:
            work.cancelled = True


def _send(loop: asyncio.AbstractEventLoop, inbox: asyncio.Queue[Delivery], delivery: Delivery) -> None:
    if not loop.is_closed():  # a server that has ended
        loop.call_soon_threadsafe(inbox.put_nowait, delivery)


__all__ = ["MOST_CHOICES", "answers", "answers_async", "make_work", "wanted_depth"]
