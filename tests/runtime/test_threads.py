"""One Generator for several threads, and several streams in one: each gets what it would get alone, or is refused."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bundles import CONFORMANCE

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Generation, Model, Sampling
from dynexport.runtime.generation.conversation import Conversation

THREADS, NEW = 8, 6
# Every executor, cache and form of graph that there is.
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "unified-skip": ("skip-2x", {}),
    "unified-skip-static": ("skip-2x", {"static": True}),
    "mod": ("mod-router", {}),
    "mod-topk": ("mod-topk", {}),
    "mod-padded": ("mod-router", {"static": True}),
    "radial-set-step": ("radial-step", {}),
    "radial-set-layer": ("radial-layer", {}),
    "radial-single-step": ("radial-step", {"layer_capacity": 1.0}),
    "radial-single-layer": ("radial-layer", {"layer_capacity": 1.0}),
}
# Batches of other shapes, so that what threads share would have to be bound anew.
BATCHES = [[[5]], [[7, 8, 9, 10, 11]], [[3, 4], [20, 21, 22, 23, 24, 25]], [[1, 2, 3], [4], [9, 8]]]
SAMPLING = Sampling(temperature=0.7, top_k=9, seed=5)


@pytest.fixture(scope="module", params=STRATEGIES)
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    case, how = STRATEGIES[request.param]
    path = tmp_path_factory.mktemp(request.param) / "bundle"
    convert(CONFORMANCE / case, path, golden=False, **how)
    return Model(Bundle.open(path), threads=1)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What ``work`` gives in each thread; all of them begin together, and take turns as often as they can."""
    begin, interval = threading.Barrier(THREADS), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda index: (begin.wait(30), work(index))[1], range(THREADS)))
    finally:
        sys.setswitchinterval(interval)


def test_eight_threads_get_what_each_would_get_alone(shared: Model) -> None:
    def generate(index: int) -> list[Generation]:
        return shared.generate(BATCHES[index % len(BATCHES)], max_new_tokens=NEW, sampling=SAMPLING)

    # Only graph sets have memory that runs share: there it takes luck to see that it is.
    times = 12 if any(program.set for program in shared.bundle.manifest.programs) else 2
    alone = [generate(index) for index in range(len(BATCHES))]
    wrong = [
        index
        for index, rounds in enumerate(at_once(lambda index: [generate(index) for _ in range(times)]))
        if any(found != alone[index % len(BATCHES)] for found in rounds)
    ]
    assert not wrong


def test_streams_taken_from_in_turn_are_what_each_is_alone(shared: Model) -> None:
    def stream(batch: list[list[int]]) -> Iterator[Any]:
        return shared.stream(batch, max_new_tokens=NEW)

    alone = [list(stream(batch)) for batch in BATCHES]
    streams = [stream(batch) for batch in BATCHES]
    together: list[list[Any]] = [[] for _ in BATCHES]
    while any(len(found) < len(own) for found, own in zip(together, alone, strict=True)):
        for pieces, found in zip(streams, together, strict=True):
            found += [piece for piece in [next(pieces, None)] if piece]
    assert together == alone


def test_threads_that_take_from_one_stream_share_its_pieces(generator: Model) -> None:
    pieces = generator.stream([[5]], max_new_tokens=40)
    taken = at_once(lambda _: [piece.token for piece in pieces])
    (alone,) = generator.generate([[5]], max_new_tokens=40)
    assert sorted(token for own in taken for token in own) == sorted(alone.ids)


def test_a_stream_that_another_thread_closes_ends(generator: Model) -> None:
    pieces = generator.stream([[5]], max_new_tokens=240)
    first = next(pieces)
    found = at_once(lambda index: pieces.close() if index == 0 else [piece.token for piece in pieces])
    assert first.finish_reason is None and sum(len(own) for own in found if own is not None) < 239
    assert list(pieces) == []


def test_a_cache_has_one_stream_at_a_time(generator: Model) -> None:
    cache = generator.executor.full_cache(1, 64)
    first, second = (generator.stream([[5]], max_new_tokens=4, cache=cache) for _ in range(2))
    next(first)
    with pytest.raises(DynexportError, match=r"^cache: expected one that no other stream uses, found it in use"):
        next(second)
    first.close()
    assert len(list(generator.stream([[6]], max_new_tokens=4, cache=cache))) == 4


def test_a_cache_has_one_step_at_a_time(shared: Model) -> None:
    executor = shared.executor
    cache = executor.full_cache(1, 16)
    executor.prefill(cache, [[5]])
    with cache.running:
        for run in (
            lambda: executor.prefill(cache, [[6]]),
            lambda: executor.step(cache, [6], executor.bundle.depth(None)),
        ):
            with pytest.raises(DynexportError, match=r"^cache: expected one that no other thread uses, found a step"):
                run()
    assert cache.positions.tolist() == [1]
    executor.step(cache, [6], executor.bundle.depth(None))


def test_a_conversation_has_one_turn_at_a_time(generator: Model) -> None:
    conversation = Conversation(generator)
    how: dict[str, Any] = {"depth": 1, "max_new_tokens": 20, "sampling": Sampling()}

    def say(index: int) -> str:
        try:
            return "".join(piece.text for piece in conversation.say(f"I am {index}", **how))
        except DynexportError as error:
            return str(error)

    refused = [said for said in at_once(say) if said.startswith("conversation: expected one turn at a time")]
    told = [message["content"] for message in conversation.messages]
    assert len(told) == 2 * (THREADS - len(refused)) and refused
    answer = conversation.say("Still there?", **how)
    next(answer)
    with pytest.raises(DynexportError, match="found an answer that has not ended; close it first"):
        next(conversation.say("And now?", **how))
    answer.close()
    list(conversation.say("And now?", **how))
    asked = conversation.messages[:-1]
    (afresh,) = generator.generate([generator.text.chat(asked)], depth=1, max_new_tokens=20)
    assert conversation.messages[-1]["content"] == afresh.text


def test_a_bundle_for_two_generators_in_threads(skip_bundle: Path) -> None:
    bundle = Bundle.open(skip_bundle)
    found = at_once(lambda _: Model(bundle, threads=1).generate([[5]], max_new_tokens=NEW)[0].ids)
    assert found == [found[0]] * THREADS
