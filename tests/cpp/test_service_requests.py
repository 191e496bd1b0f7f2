"""Bodies of requests: the C++ service refuses what the Python server refuses, in the same words, and never crashes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from conftest import Run
from pydantic import ValidationError

from dynexport.runtime.serving.http.errors import of_validation
from dynexport.runtime.serving.http.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Generation,
    TokenizeBody,
)

KINDS: dict[str, type[Body]] = {
    "completion": CompletionBody,
    "chat": ChatBody,
    "tokenize": TokenizeBody,
    "detokenize": DetokenizeBody,
}
VALID: dict[str, dict[str, Any]] = {
    "completion": {"model": "small", "prompt": "hello"},
    "chat": {"model": "small", "messages": [{"role": "user", "content": "hello"}]},
    "tokenize": {"model": "small", "prompt": "hello"},
    "detokenize": {"model": "small", "tokens": [1, 2]},
}
# Values of every JSON type, and at the ends of ranges.
VALUES = (
    *(None, True, False, 0, 1, -1, 2, -2, 20, 21, 100, 101, 128, 129, 1 << 40, (1 << 63) - 1, 1 << 63, -(1 << 63)),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 1e-6, 1e-7, 1e6, 1e300, "", "a", "auto", "none", "text", [], ["a"], ["a", 3], [3]),
    *([-1], [1.5], [None], [[]], [[1]], [[1], "a"], [[1], [-1]], ["a"] * 17, ["a"] * 129, [[1]] * 129),
    *({}, {"a": 1}, {"1": 2.5}, {"1": "a"}, {"1": True}, [{}], [{"role": "user"}, 3]),
    *({"include_usage": True}, {"include_usage": None}, {"include_usage": 3}, {"include_obfuscation": None}),
    *({"include_obfuscation": 3}, {"type": "text"}, {"type": "x"}, {"type": None}, {"type": "text", "b": 1}),
)
# Where Python's message depends on its union of types: an object is named after one of them.
QUIRKS = (("prompt", dict), ("stop", dict), ("depth", dict))
# What the service refuses and the Python server answers.
FORMATS = ("json_object", "json_schema")


@pytest.fixture(scope="module")
def parse(run: Run) -> Callable[[Sequence[tuple[str, bytes]]], list[dict[str, Any]]]:
    """Parse bodies with the service's code; returns an error, or nothing, for each."""

    def parsed(bodies: Sequence[tuple[str, bytes]]) -> list[dict[str, Any]]:
        lines = "\n".join(f"{kind} {body.hex()}" for kind, body in bodies)
        found = run("probe_requests", stdin=lines.encode())
        assert found.returncode == 0, found.stderr
        results = [json.loads(line) for line in found.stdout.splitlines()]
        assert len(results) == len(bodies)
        return results

    return parsed


def expected(kind: str, body: Any) -> dict[str, Any]:
    try:
        KINDS[kind].model_validate(body)
    except ValidationError as error:
        refused = of_validation(error, body)
        return {**refused.body["error"], "status": refused.status}
    return {}


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    for kind, model in KINDS.items():
        valid = VALID[kind]
        for name in (*model.model_fields, "zzz", "functions", "audio"):
            for value in VALUES:
                if (name, type(value)) not in QUIRKS:
                    yield kind, valid | {name: value}
            yield kind, {other: value for other, value in valid.items() if other != name}
        yield kind, {**valid, "zzz": 1, "model": 3}
        yield kind, {"zzz": 1}


def test_every_field_is_checked_as_in_python(parse: Any) -> None:
    bodies = [(kind, body) for kind, body in cases()]
    found = parse([(kind, json.dumps(body).encode()) for kind, body in bodies])
    assert sum(bool(one) for one in found) > 500 < sum(not one for one in found)
    for (kind, body), one in zip(bodies, found, strict=True):
        assert one == expected(kind, body), (kind, body)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_form_that_needs_a_constraint_library_is_refused_by_name(parse: Any, kind: str) -> None:
    form = {"type": kind, "json_schema": {"name": "a", "schema": {"type": "object"}}}
    (found,) = parse([("chat", json.dumps(VALID["chat"] | {"response_format": form}).encode())])
    assert (found["status"], found["param"], found["code"]) == (400, "response_format", "unsupported_parameter")
    assert "this server has no constraint library" in found["message"]


def mutated(generator: np.random.Generator, body: bytes) -> bytes:
    """Change some bytes of a body: replaced, removed, repeated, or exchanged for what JSON is made of."""
    changed = bytearray(body)
    pieces = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"\xff", b"1e999", b"-", b"null", b"\x00")
    for _ in range(generator.integers(1, 6)):
        at = int(generator.integers(0, len(changed) + 1))
        match generator.integers(0, 4):
            case 0:
                changed[at : at + 1] = generator.bytes(1)
            case 1:
                del changed[at : at + int(generator.integers(1, 9))]
            case 2:
                changed[at:at] = changed[: int(generator.integers(0, 40))]
            case _:
                changed[at:at] = pieces[generator.integers(len(pieces))]
    return bytes(changed)


def refuses(kind: str, body: bytes) -> bool:
    """Whether the Python server refuses a body before it looks at its model."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return True
    return bool(expected(kind, value))


def test_mutated_bodies_crash_nothing(parse: Any) -> None:
    generator = np.random.default_rng(3)
    more = {"temperature": 0.5, "n": 2, "stop": ["a", "bé"], "logit_bias": {"1": 2}, "stream": False, "seed": 5}
    valid = {kind: body | (more if issubclass(KINDS[kind], Generation) else {}) for kind, body in VALID.items()}
    bodies = [(kind, mutated(generator, json.dumps(body).encode())) for _ in range(250) for kind, body in valid.items()]
    found = parse(bodies)
    wrong = [
        (kind, body, one) for (kind, body), one in zip(bodies, found, strict=True) if bool(one) != refuses(kind, body)
    ]
    assert not wrong
    assert {one["status"] for one in found if one} == {400}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "small", "prompt": ' + b"[" * 70 + b"]" * 70 + b"}",
        b"{" + b",".join(b'"%d": 1' % number for number in range(5000)) + b"}",
        b'{"model": "small", "prompt": "a", "n": ' + b"9" * 100_000 + b"}",
    ],
    ids=["lists", "objects", "levels", "names", "digits"],
)
def test_bodies_that_cost_much_are_refused(parse: Any, body: bytes) -> None:
    (found,) = parse([("completion", body)])
    assert found["status"] == 400
