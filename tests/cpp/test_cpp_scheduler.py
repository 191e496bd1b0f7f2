"""The C++ scheduler decides and delivers, step by step, what Python's does, and each request's tokens are its own."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
from bundles import copied, replace_file, talking_checkpoint
from forms import CONTEXT, FORMS, executor_of
from routes_of_cases import LOOPED, runs_of

from dynexport.exporter import convert
from dynexport.exporter.bundle.drafting import store_ngrams
from dynexport.exporter.bundle.ngrams import learn_ngrams
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.batch import EvenChunks
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.request import Piece
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.generation.speculation import Speculation
from dynexport.runtime.serving.scheduler import Scheduler
from dynexport.runtime.serving.settings import Settings
from dynexport.runtime.serving.submit import make_work, wanted_depth
from dynexport.runtime.serving.watch import Unwatched
from dynexport.runtime.serving.work import Answer, Delivery, Reason, Work

Json = dict[str, Any]
Run = Callable[..., Any]
CHUNK = 4
MODELS: dict[str, Model] = {}


def model_of(form: str) -> Model:
    """Return a model of a form, which the tests of this file share."""
    if form not in MODELS:
        executor = executor_of(form)
        MODELS[form] = Model(executor.bundle, threads=1)
    return MODELS[form]


class Counts(Unwatched):
    """Counts what a scheduler reports, as the C++ program does."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def started(self, work: Work, waited: float) -> None:
        self.counts["started"] += 1

    def ran(self, prompt_tokens: int, rows: int, seconds: float) -> None:
        self.counts["prompt"] += prompt_tokens
        self.counts["decode"] += 0 if prompt_tokens else rows

    def answered(self, answer: Answer, gap: float, *, first: bool) -> None:
        self.counts["first" if first else "later"] += 1

    def ended(self, answer: Answer, reason: Reason | str, decided: Sequence[Decisions], overflow: int) -> None:
        self.counts[reason] += 1
        self.counts["overflow"] += overflow
        self.counts["decided"] += sum(call.ran.shape[1] for call in decided)

    def dropped(self, work: Work, reason: Reason) -> None:
        self.counts[f"dropped {reason}"] += 1

    def stepped(self, seconds: float) -> None:
        self.counts["steps"] += 1


def _told(piece: Piece, layers: int) -> list[Any]:
    return [piece.row, piece.token, piece.text, piece.finish_reason, piece.stop_reason, layers, piece.draft]


def _options(given: Json) -> Json:
    """Return the options of make_work and Model.choices."""
    kept = {
        name: given[name] for name in ("max_new_tokens", "depth", "stop", "stop_token_ids", "chat") if name in given
    }
    sampling = dict(given.get("sampling", {}))
    return {**kept, "sampling": Sampling(**sampling)}


def python(model: Model, settings: Json, requests: Sequence[Json]) -> Json:
    """Run a script on Python's scheduler, as the C++ program does."""
    watch = Counts()
    scheduler = Scheduler(model.executor, Settings(**settings), watch)
    works: list[Work | None] = [None] * len(requests)
    refused: dict[str, str] = {}
    steps: list[list[Any]] = []
    last = max(max(given.get("arrive", 0), given.get("cancel", 0)) for given in requests)

    def taker(index: int) -> Callable[[Delivery], None]:
        def take(delivery: Delivery) -> None:
            pieces = [_told(answered.piece, answered.layers) for answered in delivery.answered]
            failure = delivery.failure and [delivery.failure.reason, delivery.failure.message]
            steps[-1].append([index, pieces, failure, delivery.done])

        return take

    while len(steps) <= last or not scheduler.idle:
        for index, given in enumerate(requests):
            if given.get("cancel") == len(steps) and (other := works[index]) is not None:
                other.cancelled = True
            if given.get("arrive", 0) == len(steps):
                more = {"n": given.get("n", 1), "seconds": given.get("seconds"), "deliver": taker(index)}
                try:
                    options = _options(given) | {"depth": wanted_depth(model, given.get("depth"))}
                    works[index] = work = make_work(model, given["prompt"], **options, **more)
                    scheduler.check(work)
                    work.arrived = time.monotonic()
                    scheduler.add(work)
                except DynexportError as error:
                    refused[str(index)] = str(error)
        steps.append([])
        scheduler.step()
    assert scheduler.cache.free == list(range(scheduler.cache.rows))
    return {
        "steps": steps,
        "refused": refused,
        "reused": [0 if work is None else work.reused for work in works],
        "counts": dict(watch.counts),
        "used": scheduler.used,
        "prefix_bytes": 0 if scheduler.prefixes is None else scheduler.prefixes.size,
        "failures": scheduler.failures,
    }


def cpp(run: Run, model: Model, **given: Any) -> Any:
    """Run the C++ program on a model's bundle."""
    done = run("probe_schedule", stdin=json.dumps({"bundle": str(model.bundle.path), **given}).encode())
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def compare(run: Run, model: Model, settings: Json, requests: Sequence[Json]) -> Json:
    """Run a script in both languages; return what both gave."""
    expected = python(model, settings, requests)
    found: Json = cpp(run, model, settings=settings, requests=requests)
    assert len(found["steps"]) == len(expected["steps"])
    for number, (ours, theirs) in enumerate(zip(found["steps"], expected["steps"], strict=True)):
        assert ours == theirs, f"step {number}"
    counts = [{name: count for name, count in each["counts"].items() if count} for each in (found, expected)]
    assert counts[0] == counts[1]
    for name in ("refused", "reused", "used", "prefix_bytes", "failures"):
        assert found[name] == expected[name], name
    return expected


def tokens_of(script: Json, index: int) -> list[list[int]]:
    """Return the tokens of each answer of a request."""
    tokens: dict[int, list[int]] = {}
    for step in script["steps"]:
        for which, pieces, _, _ in step:
            for row, token, *_ in pieces if which == index else ():
                tokens.setdefault(row, []).append(token)
    return [tokens[row] for row in sorted(tokens)]


def failures_of(script: Json) -> dict[int, str]:
    """Return why requests failed, by index."""
    return {which: failure[0] for step in script["steps"] for which, _, failure, _ in step if failure}


def requests_of(model: Model, seed: int, count: int = 12) -> list[Json]:
    """Draw requests: prompts that begin alike, several answers, depths, draws, arrivals and cancellations."""
    rng = np.random.default_rng(seed)
    manifest = model.bundle.manifest
    vocabulary, depths = manifest.model.vocab_size, [None, *(depth.name for depth in manifest.depths)]
    begin = rng.integers(0, vocabulary, 9).tolist()
    requests: list[Json] = []
    arrive = 0
    for index in range(count):
        arrive += int(rng.integers(0, 4))
        given: Json = {
            "prompt": [*begin[: 9 * (index % 2)], *rng.integers(0, vocabulary, rng.integers(1, 14)).tolist()],
            "max_new_tokens": int(rng.integers(1, 9)),
            "n": 1 + (index % 4 == 3),
            "depth": depths[int(rng.integers(len(depths)))],
            "arrive": arrive,
            "sampling": {"seed": index, "temperature": 0.8 * (index % 3 == 2), "repetition_penalty": 1.2},
        }
        if index % 5 == 4:
            given["cancel"] = arrive + int(rng.integers(0, 6))
        if index % 6 == 5:
            given["sampling"] = {"logprobs": 2, "min_new_tokens": 2}
            given["stop_token_ids"] = rng.integers(0, vocabulary, 20).tolist()
        requests.append(given)
    return requests


@pytest.mark.parametrize("prefix_bytes", [0, 1 << 20], ids=["no prefixes", "prefixes"])
@pytest.mark.parametrize("form", FORMS)
def test_a_script_gives_the_same_deliveries_step_by_step(run: Run, form: str, prefix_bytes: int) -> None:
    model = model_of(form)
    settings = {"rows": 3, "chunk": CHUNK, "prefix_bytes": prefix_bytes}
    requests = requests_of(model, seed=len(form))
    script = compare(run, model, settings, requests)
    alone = cpp(run, model, alone=True, requests=[given | {"chunk": CHUNK, "even": True} for given in requests])
    failed = failures_of(script)
    for index, (given, each) in enumerate(zip(requests, alone, strict=True)):
        if index in failed:
            continue
        options = _options(given) | {"chunk": EvenChunks(CHUNK)}
        expected = model.choices(given["prompt"], given["n"], **options)
        assert tokens_of(script, index) == [answer.ids for answer in expected]
        rows = [[token for row, token, *_ in each["pieces"] if row == answer] for answer in range(given["n"])]
        assert rows == [answer.ids for answer in expected], "the C++ Generator's"


@pytest.mark.parametrize("form", LOOPED)
def test_rows_that_leave_at_different_loops_share_a_step(run: Run, form: str) -> None:
    model, expected = model_of(form), runs_of(form)
    asked = [*expected, *reversed(expected)]
    requests = [
        {"prompt": answer.prompt, "max_new_tokens": len(answer.greedy), "arrive": 2 * index}
        for index, answer in enumerate(asked)
    ]
    script = compare(run, model, {"rows": len(expected), "chunk": CHUNK, "prefix_bytes": 1 << 20}, requests)
    for index, answer in enumerate(asked):
        assert tokens_of(script, index) == [answer.greedy]
        told = [
            layers
            for step in script["steps"]
            for which, pieces, *_ in step
            for *_, layers, _ in pieces
            if which == index
        ]
        assert told == answer.layers


def test_a_known_prefix_is_copied_and_the_oldest_part_goes_when_memory_is_full(run: Run) -> None:
    model = model_of("dense")
    prompt = list(range(5, 18))
    requests: list[Json] = [
        {"prompt": [*prompt[: 13 - index % 3], index], "max_new_tokens": 3, "arrive": 20 * index} for index in range(6)
    ]
    script = compare(run, model, {"rows": 2, "chunk": CHUNK, "prefix_bytes": 1 << 20}, requests)
    assert script["reused"] == [0, 12, 8, 12, 12, 8]
    part = script["prefix_bytes"] // 4
    requests += [{"prompt": [40 + index] * 12, "max_new_tokens": 2, "arrive": 120 + 20 * index} for index in range(3)]
    requests += [{"prompt": [*prompt, 3], "max_new_tokens": 2, "arrive": 200}]
    compare(run, model, {"rows": 2, "chunk": CHUNK, "prefix_bytes": 4 * part}, requests)


def test_requests_that_can_never_run_are_refused_with_the_same_words(run: Run) -> None:
    for form in ("dense", "mod-tensorrt"):
        model = model_of(form)
        requests: list[Json] = [
            {"prompt": [1] * CONTEXT, "max_new_tokens": 5},
            {"prompt": [1, 2], "n": 4},
            {"prompt": [1, 2], "n": 0},
            {"prompt": [1, 2], "n": 129},
            {"prompt": []},
            {"prompt": [1, 9999]},
            {"prompt": [-1]},
            {"prompt": [1], "max_new_tokens": 0},
            {"prompt": [1], "depth": "9"},
            {"prompt": [1], "stop_token_ids": [4000]},
            {"prompt": [1], "sampling": {"temperature": -1.0}},
            {"prompt": [1], "sampling": {"logit_bias": {"4000": 1.0}}},
            {"prompt": [1, 2, 3], "max_new_tokens": 2},
        ]
        for given in requests:
            if "logit_bias" in given.get("sampling", {}):
                given["sampling"] = {"suppress_tokens": [4000]}
        script = compare(run, model, {"rows": 3, "chunk": CHUNK, "reserved": 60}, requests)
        assert len(script["refused"]) == len(requests) - 1


def test_time_limits_and_cancellations_free_rows_within_a_step(run: Run) -> None:
    model = model_of("mod")
    requests: list[Json] = [
        {"prompt": [1, 2, 3], "max_new_tokens": 30, "cancel": 5},
        {"prompt": [4] * 12, "max_new_tokens": 20, "cancel": 2},
        {"prompt": [5, 6], "max_new_tokens": 5, "seconds": 0.0},
        {"prompt": [7, 8], "max_new_tokens": 9, "arrive": 1, "n": 2},
        {"prompt": [9], "max_new_tokens": 9, "arrive": 1, "cancel": 1},
        {"prompt": [9], "max_new_tokens": 9, "arrive": 3, "cancel": 900},
    ]
    requests[-1]["cancel"] = 4
    script = compare(run, model, {"rows": 2, "chunk": CHUNK}, requests)
    assert failures_of(script) == {0: "cancelled", 1: "cancelled", 2: "timeout", 5: "cancelled"}


def test_options_that_leave_no_token_end_their_request_only(run: Run) -> None:
    model = model_of("dense")
    vocabulary = model.bundle.manifest.model.vocab_size
    none: Json = {"prompt": [3, 4], "max_new_tokens": 4, "sampling": {"suppress_tokens": list(range(vocabulary))}}
    later: Json = {"prompt": [3, 4], "max_new_tokens": 9, "n": 2, "sampling": {"no_repeat_ngram_size": 1}}
    later["sampling"]["suppress_tokens"] = list(range(5, vocabulary))
    others: list[Json] = [{"prompt": [5, 6, 7], "max_new_tokens": 12}, {"prompt": [8], "max_new_tokens": 12}]
    script = compare(run, model, {"rows": 4, "chunk": CHUNK}, [others[0], none, later, others[1]])
    assert failures_of(script) == {1: "failed", 2: "failed"}
    assert script["failures"] == 0


@pytest.fixture(scope="module")
def talking() -> Model:
    """Return a model with a tokenizer."""
    home = Path(mkdtemp(prefix="talking-"))
    convert(talking_checkpoint(home / "model"), home / "bundle", speedups=[2.0], golden=False)
    return Model(Bundle.open(home / "bundle"), threads=1)


def test_texts_and_stop_strings_are_the_same(run: Run, talking: Model) -> None:
    rng = np.random.default_rng(3)
    vocabulary = talking.bundle.manifest.model.vocab_size
    requests: list[Json] = []
    for index in range(24):
        prompt = rng.integers(0, vocabulary, 1 + index % 7).tolist()
        sampling = {"temperature": 0.9, "seed": index}
        text = talking.generate(prompt, max_new_tokens=16, sampling=Sampling(**sampling)).text  # type: ignore[arg-type]
        middle = len(text) // 2
        stops = [
            [],
            [text[middle : middle + 2]] if text[middle : middle + 2] else [],
            ["no such text", text[-3:] or "x"],
        ]
        more = {"prompt": prompt, "max_new_tokens": 16, "sampling": sampling, "stop": stops[index % 3]}
        requests.append(more | {"chat": index % 2 == 0, "arrive": index, "depth": ("full", "2")[index % 2]})
    script = compare(run, talking, {"rows": 5, "chunk": 8}, requests)
    ends = Counter(piece[3] for step in script["steps"] for _, pieces, _, _ in step for piece in pieces)
    assert ends["stop"] > 3
    assert ends["length"] > 3


@pytest.mark.parametrize("form", ["dense", "skip", "mod", "radial-step", "skip-tensorrt"])
def test_prompts_in_one_batch_give_what_they_give_in_python(run: Run, form: str) -> None:
    model = model_of(form)
    requests = [
        {name: value for name, value in given.items() if name not in ("n", "stop_token_ids")}
        for given in requests_of(model, seed=11, count=6)
    ]
    for given in requests:
        given |= {"max_new_tokens": 7}
    expected = model.generate(
        [given["prompt"] for given in requests],
        max_new_tokens=7,
        sampling=[Sampling(**given["sampling"]) for given in requests],
        depth=[given["depth"] for given in requests],
    )
    found = cpp(run, model, together=True, requests=requests)
    assert found["whole"]
    for index, answer in enumerate(expected):
        pieces = [piece for piece in found["pieces"] if piece[0] == index]
        assert [token for _, token, *_ in pieces] == answer.ids
        assert pieces[-1][3:5] == [answer.finish_reason, answer.stop_reason]


def test_a_callback_cancels_a_generation_and_errors_are_those_of_python(run: Run) -> None:
    model = model_of("dense")
    vocabulary = model.bundle.manifest.model.vocab_size
    whole = model.generate([1, 2, 3], max_new_tokens=9).ids
    wrong: list[Json] = [
        {"prompt": [1] * (CONTEXT + 1)},
        {"prompt": []},
        {"prompt": [vocabulary]},
        {"prompt": [1], "depth": "7"},
        {"prompt": [1], "stop": ["x"]},
        {"prompt": [1], "max_new_tokens": 0},
        {"prompt": [1, 2], "sampling": {"suppress_tokens": list(range(vocabulary))}},
    ]
    given: Json = {"prompt": [1, 2, 3], "max_new_tokens": 9}
    first, *others = cpp(run, model, alone=True, requests=[given | {"take": 4}, *wrong])
    assert first["whole"] is False
    assert [token for _, token, *_ in first["pieces"]] == whole[:4]
    for fields, found in zip(wrong, others, strict=True):
        with pytest.raises(DynexportError) as refused:
            model.choices(fields["prompt"], 1, **_options(fields))
        assert found["error"] == str(refused.value)


@pytest.mark.parametrize("draft", [None, "2", "full"])
@pytest.mark.parametrize("form", ["skip", "skip-plugins", "skip-tensorrt"])
def test_drafts_change_no_token_and_no_text(run: Run, form: str, draft: str | None) -> None:
    """Alone, in one batch, and as they come to a scheduler; greedily, and with random numbers of their own."""
    model = model_of(form)
    requests: list[Json] = [
        {
            "prompt": [5, 6, 7] * (index + 1),
            "max_new_tokens": 20,
            "depth": "full",
            "arrive": index,
            "sampling": {"temperature": 0.8, "seed": index, "repetition_penalty": 1.1} if index % 2 else {},
        }
        for index in range(4)
    ]
    always = draft == "2"
    how: Json = {"speculation": {"most": 4, "always": always, **({"draft": draft} if draft else {})}}
    settings = {"rows": 4, "chunk": CHUNK, "prefix_bytes": 1 << 20}
    for way in ({"alone": True}, {"together": True}, {"settings": settings}):
        plain, drafted = (pieces_of(cpp(run, model, requests=requests, **way, **more)) for more in ({}, how))
        assert [piece[:6] for piece in drafted] == [piece[:6] for piece in plain]
        # Without "always", the first draft is tried where a row is alone, but never one that costs as much as a step;
        # later ones by the times of calls.
        if "alone" in way or always:
            assert any(piece[6] is not None for piece in drafted) == (draft != "full")
        assert all(piece[6] is None for piece in plain)


def test_drafts_of_a_table_are_python_s(run: Run, tmp_path: Path) -> None:
    """Row by row, every step with all drafts: the same tokens drafted in the same places."""
    plain = model_of("skip-plugins")
    prompts = [[5, 6, 7] * (index + 1) for index in range(3)]
    answers = plain.generate(prompts, max_new_tokens=30, depth="full")
    windows = [np.array([*prompt, *each.ids]) for prompt, each in zip(prompts, answers, strict=True)]
    learned = learn_ngrams(windows[:2])
    assert learned is not None
    path = copied(plain.bundle.path, tmp_path / "bundle")
    stored = store_ngrams(Bundle.open(path), learned, 60)
    model = Model(Bundle.open(path), threads=1)
    requests: list[Json] = [{"prompt": prompt, "max_new_tokens": 30, "depth": "full"} for prompt in prompts]
    made = pieces_of(cpp(run, model, requests=requests, alone=True, speculation={"most": 6, "always": True}))
    how = Speculation(6, always=True)
    streams = [model.stream([prompt], max_new_tokens=30, depth="full", speculation=how) for prompt in prompts]
    expected = [[number, piece.token, piece.draft] for number, stream in enumerate(streams) for piece in stream]
    assert [[number, token, draft] for _, token, *_, draft, number in made] == expected
    assert sum(token == draft for _, token, draft in expected) > 20
    replace_file(path, stored.file, (path / stored.file).read_bytes()[:-1])
    with pytest.raises(DynexportError) as refused:
        Model(Bundle.open(path), threads=1).generate([1, 2], speculation=Speculation())
    (found,) = cpp(run, model, requests=requests[:1], alone=True, speculation={"most": 6})
    assert found["error"] == str(refused.value)


def pieces_of(made: Any) -> list[list[Any]]:
    """Return all pieces of a script or of generations, request by request, with the number of their request."""
    if isinstance(made, list):
        return [[*piece, index] for index, each in enumerate(made) for piece in each["pieces"]]
    if "pieces" in made:
        return sorted(([*piece, piece[0]] for piece in made["pieces"]), key=lambda piece: int(piece[0]))
    each = [[*piece, which] for step in made["steps"] for which, pieces, _, _ in step for piece in pieces]
    return sorted(each, key=lambda piece: int(piece[-1]))


def test_a_number_of_drafts_that_cannot_be(run: Run) -> None:
    model = model_of("skip")
    request = {"prompt": [1, 2], "max_new_tokens": 4}
    for most in (0, 65):
        (found,) = cpp(run, model, alone=True, requests=[request], speculation={"most": most})
        assert found["error"] == f"speculate: expected 1..64, found {most}"
