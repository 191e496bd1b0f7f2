"""``dynexport run --input``: every request is answered once, as alone, however often the command is killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bundles import Ran, dynexport, environment, error_of, skip_bundle  # noqa: F401 - a fixture

from dynexport.runtime import Bundle, Model
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation.sampling import Sampling
from dynexport.runtime.serving.batch.job import answer_file, batch_settings
from dynexport.runtime.serving.worker import Worker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id: Any, url: str = TEXT, **body: Any) -> str:
    wanted = {"model": "bundle", **({"prompt": "hello"} if url == TEXT else {}), **body}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": wanted})


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{each}\n" for each in lines))
    return path


def many(count: int) -> list[str]:
    """Requests of both kinds, greedy and with a seed, at both depths."""
    found = []
    for number in range(count):
        more: dict[str, Any] = {"max_tokens": 3 + number % 17, "depth": ["full", 2][number % 2]}
        more |= {"temperature": 0.9, "seed": number} if number % 3 == 0 else {"temperature": 0}
        text = "the quick brown fox"[: 1 + number % 19]
        if number % 4 == 3:
            found.append(line(f"r{number}", CHAT, messages=[{"role": "user", "content": text}], n=2, **more))
        else:
            found.append(line(f"r{number}", prompt=text if number % 4 else [text, "a"], **more))
    return found


def texts(path: Path) -> dict[str, Any]:
    """The answers' texts by custom_id, each of which is there once."""
    answers = [json.loads(each) for each in path.read_text().splitlines()]
    found = {}
    for answer in answers:
        assert answer["custom_id"] not in found
        choices = (answer["response"] or {}).get("body", {}).get("choices")
        found[answer["custom_id"]] = choices and [each.get("text", each.get("message")) for each in choices]
    return found


def run(bundle: Path, source: Path, target: Path, *more: object) -> Ran:
    return dynexport("run", bundle, "--input", source, "-o", target, "--threads", 1, *more)


def test_answers_are_those_of_the_model_alone(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    chat = [{"role": "user", "content": "hi"}]
    source = written(
        tmp_path / "in",
        line("one", prompt="hello", max_tokens=9, temperature=0),
        line("two", CHAT, messages=chat, max_tokens=7, depth=2, logprobs=True, top_logprobs=2),
        line("three", model="bundle@2", prompt=["ab", "abc"], n=2, temperature=1.0, seed=5, max_tokens=6),
    )
    ran = run(skip_bundle, source, tmp_path / "out", "--json", "-")
    assert ran.code == 0, ran.err
    assert (ran.report["requests"], ran.report["answered"], ran.report["errors"]) == (3, 3, 0)
    model = Model(Bundle.open(skip_bundle), threads=1)
    answers = {each["custom_id"]: each for each in map(json.loads, (tmp_path / "out").read_text().splitlines())}
    assert list(answers["one"]) == ["id", "custom_id", "response", "error"]
    assert {(each["response"]["status_code"], each["error"]) for each in answers.values()} == {(200, None)}
    body = answers["two"]["response"]["body"]
    alone = model.chat(chat, max_new_tokens=7, depth=2)
    assert body["choices"][0]["message"]["content"] == alone.text
    assert len(body["choices"][0]["logprobs"]["content"]) == len(alone.ids) == body["usage"]["completion_tokens"]
    sampling = Sampling(temperature=1.0, seed=5)
    both = [
        each.text
        for prompt in ("ab", "abc")
        for each in model.choices(prompt, 2, max_new_tokens=6, depth=2, sampling=sampling)
    ]
    assert texts(tmp_path / "out")["three"] == both
    assert texts(tmp_path / "out")["one"] == [model.generate("hello", max_new_tokens=9).text]
    assert ran.report["tokens"] == sum(
        each["response"]["body"]["usage"]["completion_tokens"] for each in answers.values()
    )


def test_a_bad_line_is_an_error_and_not_the_end(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    bad = {
        "{": (None, "line 1: expected JSON"),
        line("a", "/v1/embeddings"): (None, "line 2: url: Input should be"),
        line("b", more=1): (400, "Unrecognized request argument supplied: more"),
        line("c", model="other"): (404, "model: expected one of bundle, found other"),
        line("d", depth=7): (400, "depth: expected one of full, 2, found 7"),
        line("e", max_tokens=300): (400, "prompt: expected at most 256 tokens together with the answer"),
        line("f", stream=True): (400, "stream: expected false in a batch, found true"),
        line("g", prompt="é"): (400, "prompt: "),
        line("h", CHAT): (400, "you must provide a messages parameter"),
        line("i", prompt=[1, 500]): (400, "prompt: "),
        line("j", n=9): (400, "n: expected at most 8 answers, found 9"),
    }
    good = line("good", max_tokens=2)
    source = written(tmp_path / "in", *bad, "", good)
    ran = run(skip_bundle, source, tmp_path / "out", "--json", "-")
    assert ran.code == 0, ran.err
    assert "warning: 11 of 12 answers are errors" in ran.err
    answers = {
        each["id"].rsplit("_")[-1]: each for each in map(json.loads, (tmp_path / "out").read_text().splitlines())
    }
    assert len(answers) == 12 and answers["13"]["response"]["status_code"] == 200
    for number, (status, message) in enumerate(bad.values(), start=1):
        answer = answers[str(number)]
        assert (answer["response"] is None) == (status is None), answer
        found = answer["error"] if status is None else answer["response"]["body"]["error"]
        assert message in found["message"], found
        assert status is None or (answer["response"]["status_code"], answer["error"]) == (status, None)
    assert (answers["1"]["custom_id"], answers["2"]["custom_id"]) == (None, "a")


def test_killed_at_any_moment_it_goes_on(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    source = written(tmp_path / "in", *many(60), "no JSON")
    assert run(skip_bundle, source, tmp_path / "undisturbed").code == 0
    target = tmp_path / "out"
    command = ["run", skip_bundle, "--input", source, "-o", target, "--threads", 1]
    script = Path(__file__).with_name("killed_runs.py")
    ran = subprocess.run(
        [sys.executable, script, target, "3", "20", *map(str, command)],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
        timeout=120,
    )
    assert int(ran.stdout.splitlines()[-1]) >= 3, ran
    assert len(texts(target)) == 61
    assert texts(target) == texts(tmp_path / "undisturbed")
    again = run(skip_bundle, source, target, "--json", "-")
    assert (again.report["before"], again.report["answered"], again.report["tokens"]) == (61, 0, 0)


def test_what_cannot_be_done_is_told_before_anything_is_written(skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    source, target = written(tmp_path / "in", line("a"), line("b"), line("a")), tmp_path / "out"
    assert "line 3: expected a custom_id of its own, found that of line 1" in error_of(run(skip_bundle, source, target))
    assert not target.exists()
    written(source, line("a", max_tokens=1))
    assert run(skip_bundle, source, target).code == 0
    before = target.read_bytes()
    assert "found one of another; name another output" in error_of(run(skip_bundle, source, target, "--max-length", 99))
    written(source, line("a", max_tokens=2))
    assert "found one to other requests" in error_of(run(skip_bundle, source, target))
    assert target.read_bytes() == before
    for arguments, message in (
        (["--input", source], "--output: expected a file with --input, found none"),
        (["-o", target, "--prompt", "a"], "--output: expected with --input, found without"),
        (["--input", source, "-o", target, "--temperature", 1], "--temperature: expected without --input"),
        (["--input", "/dev/stdin", "-o", target], "expected a file of requests, found a device"),
    ):
        assert message in error_of(dynexport("run", skip_bundle, *arguments))


def test_a_worker_that_stops_ends_the_run_and_no_request(
    skip_bundle: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, target = written(tmp_path / "in", *many(20)), tmp_path / "out"

    def job() -> Worker:
        return Worker(Model(Bundle.open(skip_bundle), threads=1), batch_settings(3, None, 0))

    worker = job()
    step, count = worker.scheduler.step, 0

    def failing() -> None:
        nonlocal count
        count += 1
        if count == 40:
            raise RuntimeError("out of order")
        step()

    monkeypatch.setattr(worker.scheduler, "step", failing)
    with pytest.raises(DynexportError, match="the worker stopped: RuntimeError: out of order"):
        answer_file(source, target, "bundle", worker)
    begun = texts(target)
    assert 0 < len(begun) < 20
    totals = answer_file(source, target, "bundle", job())
    assert (totals.before, totals.answered, totals.errors) == (len(begun), 20 - len(begun), 0)
    answer_file(source, tmp_path / "other", "bundle", job())
    assert texts(target) == texts(tmp_path / "other")


def test_few_requests_are_in_memory(skip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    worker = Worker(Model(Bundle.open(skip_bundle), threads=1), batch_settings(2, None, 0))
    waiting: list[int] = []
    submit = worker.submit
    monkeypatch.setattr(
        worker,
        "submit",
        lambda work: (submit(work), waiting.append(worker.scheduler.waiting + worker.scheduler.running)),
    )
    source = written(tmp_path / "in", *(line(f"r{n}", max_tokens=2) for n in range(60)))
    answer_file(source, tmp_path / "out", "bundle", worker)
    assert len(waiting) == 60 and max(waiting) <= 4
