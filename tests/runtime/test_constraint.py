"""Answers limited to JSON: whatever the logits, a finished text parses and fulfils the schema."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema_rs
import llguidance
import numpy as np
import pytest
from test_text import KINDS, TEXTS, text_of
from tokenizers import Tokenizer

from dynexport.runtime import Model, Sampling
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.generation import constraint as module
from dynexport.runtime.generation.constraint import Constraint
from dynexport.runtime.generation.request import Generation, Request
from dynexport.runtime.generation.sampler import RowSampler, choose
from dynexport.runtime.text.text import Text

TEXT = TEXTS["byte level"]
VOCABULARY = KINDS["byte level"].get_vocab_size()
(END,) = KINDS["byte level"].encode("</s>").ids
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "enum": {"enum": ["red", "größer", None, 5, ["x", {"y": 1.5}]]},
    "const": {"const": {'a "quoted\\ key': "line\nbreak, é🎉"}},
    "range": {"type": "number", "minimum": -2.5, "exclusiveMaximum": 10},
    "whole": {"type": "integer", "minimum": 17, "maximum": 400, "multipleOf": 7},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,5}-(é|🎉|[0-9]+x)$", "maxLength": 12},
    "formats": {
        "type": "array",
        "prefixItems": [{"format": "date", "type": "string"}, {"format": "uuid"}],
        "items": False,
    },
    "list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "either": {
        "anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}],
        "$defs": {"pair": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "integer"}}},
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"n": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                "required": ["n", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "both": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 3}}},
        ]
    },
    "object": {"type": "object"},
    "anything": {},
}
OPTIONS = (
    Sampling(temperature=1.0, seed=1),
    Sampling(logprobs=3),
    Sampling(temperature=1.3, seed=2, top_p=0.9, top_k=60, repetition_penalty=1.2, frequency_penalty=0.5),
    Sampling(temperature=0.7, seed=3, logprobs=0, logit_bias={END: 20}, no_repeat_ngram_size=30),
)


def answer(
    limit: Constraint | None,
    logits: Callable[[], np.ndarray],
    sampling: Sampling,
    *,
    text: Text = TEXT,
    new_tokens: int = 250,
    ends: frozenset[int] = frozenset((END,)),
) -> Generation:
    """What a model with these logits, step by step, answers."""
    sampler = RowSampler(sampling, eos=ends, constraint=limit)
    request = Request(
        0,
        None,
        sampler,
        text,
        stop=(),
        eos=ends,
        max_new_tokens=new_tokens,
        room=new_tokens,  # type: ignore[arg-type]
    )
    done = Generation(0)
    while True:
        (choice,) = choose(logits()[None], [sampler])
        piece = request.push(choice)
        done.push(piece)
        if piece.finish_reason is not None:
            return done


def random_logits(seed: int, vocabulary: int = VOCABULARY) -> Callable[[], np.ndarray]:
    """Other logits at each step, over the tokenizer's tokens and some more that the head has."""
    draws = np.random.default_rng(seed)
    return lambda: (3 * draws.standard_normal(vocabulary + 9)).astype(np.float32)


def fulfils(schema: Mapping[str, Any], text: str) -> bool:
    return jsonschema_rs.validator_for(dict(schema), validate_formats=True).is_valid(json.loads(text))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_finished_text_fulfils_its_schema_whatever_the_logits(name: str) -> None:
    schema, finished = SCHEMAS[name], 0
    for seed in range(12):
        done = answer(Constraint.json_schema(TEXT, schema), random_logits(seed), OPTIONS[seed % len(OPTIONS)])
        if done.finish_reason == "stop":
            finished += 1
            assert fulfils(schema, done.text), done.text
            assert done.stop_reason in (None, END)
        else:
            assert len(done.ids) == 250
    assert finished


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_a_person_is_written_with_any_tokenizer(kind: str) -> None:
    text, size = TEXTS[kind], KINDS[kind].get_vocab_size()
    done = answer(Constraint.json_schema(text, PERSON), random_logits(5, size), OPTIONS[0], text=text)
    assert done.finish_reason == "stop"
    assert fulfils(PERSON, done.text)


def preferring(*tokens: int) -> Callable[[], np.ndarray]:
    """Logits that fall from the first of these tokens to the last; all other tokens are equal and below them."""
    logits = np.zeros(VOCABULARY, np.float32)
    logits[list(tokens)] = np.arange(len(tokens), 0, -1)
    return lambda: logits


def test_the_end_comes_only_after_a_complete_text() -> None:
    (nine,) = TEXT.encode("9")
    done = answer(Constraint.json_schema(TEXT, {"type": "integer"}), preferring(END, nine), Sampling())
    assert (done.ids, done.text, done.finish_reason, done.stop_reason) == ([nine, END], "9", "stop", END)


def test_a_text_that_nothing_can_continue_is_finished() -> None:
    ids = TEXT.encode("[9]")
    limit = Constraint.json_schema(TEXT, {"const": [9]})
    done = answer(limit, preferring(*ids), Sampling(min_new_tokens=90), ends=frozenset())
    assert (done.ids, done.text, done.finish_reason, done.stop_reason) == (ids, "[9]", "stop", None)


def test_a_text_that_is_cut_is_told_so() -> None:
    (quote,) = TEXT.encode('"')
    (other,) = TEXT.encode("x")
    done = answer(Constraint.json_schema(TEXT, {"type": "string"}), preferring(other, quote), Sampling(), new_tokens=5)
    assert (done.text, done.finish_reason) == ('"xxxx', "length")


def test_white_space_ends() -> None:
    """A model that likes line breaks best writes one at a place, and 64 spaces."""
    line, space = TEXT.encode("\n") + TEXT.encode(" ")
    done = answer(Constraint.json_schema(TEXT, {"const": [1]}), preferring(line, space, END), Sampling())
    assert done.text == "[#1#]".replace("#", "\n" + 64 * " ")


def test_log_probabilities_are_those_before_the_schema() -> None:
    logits = random_logits(3)()
    (free,) = choose(logits[None], [RowSampler(Sampling(logprobs=20))])
    limit = Constraint.json_schema(TEXT, PERSON)
    (limited,) = choose(logits[None], [RowSampler(Sampling(logprobs=20), constraint=limit)])
    assert limited.top == free.top
    assert limited.token != free.token
    total = np.log(np.exp(logits.astype(np.float64)).sum())
    assert limited.logprob == pytest.approx(logits[limited.token] - total, abs=1e-5)


def test_a_row_without_a_schema_is_as_without_its_neighbour() -> None:
    logits = np.stack([random_logits(seed)() for seed in (1, 2)])
    options = Sampling(temperature=1.0, seed=9)
    limited = RowSampler(options, constraint=Constraint.json_schema(TEXT, PERSON))
    _, beside = choose(logits, [limited, RowSampler(options, seed_index=1)])
    (alone,) = choose(logits[1:], [RowSampler(options, seed_index=1)])
    assert beside == alone


# With a model: its vocabulary is the characters up to "u", so it can write no object.

SEVERAL = {"type": "array", "items": {"enum": [0, 12, 999, "no", True]}, "minItems": 2, "maxItems": 9}


def test_every_answer_has_a_state_of_its_own(generator: Model) -> None:
    options = Sampling(temperature=2.0, seed=4)
    rows = generator.choices([5, 6], 4, schema=SEVERAL, max_new_tokens=120, sampling=options)
    assert len({row.text for row in rows}) == 4
    for row in rows:
        assert row.finish_reason == "stop" and fulfils(SEVERAL, row.text), row
    alone = generator.generate([5, 6], schema=SEVERAL, max_new_tokens=120, sampling=options)
    assert alone == rows[0]


def test_a_schema_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def fast(script: str, *_: object) -> dict[str, str]:
        ran.append(script)
        return {}

    monkeypatch.setattr(module, "run_limited", fast)
    text = text_of(KINDS["byte level"])
    for repeat in range(2):
        for number in range(16 + repeat):
            Constraint.json_schema(text, {"const": number})
    assert len(ran) == 17
    Constraint.json_schema(text, {"const": 16})
    assert len(ran) == 17
    Constraint.json_schema(text, {"const": 0})  # the oldest
    assert len(ran) == 18


def test_threads_compile_a_schema_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def slow(script: str, *_: object) -> dict[str, str]:
        time.sleep(0.05)
        ran.append(script)
        return {}

    monkeypatch.setattr(module, "run_limited", slow)
    text = text_of(KINDS["byte level"])
    with ThreadPoolExecutor(8) as threads:
        limits = list(threads.map(lambda _: Constraint.json_schema(text, PERSON), range(8)))
    assert len(ran) == 1
    done = [answer(limit, random_logits(1), OPTIONS[0]) for limit in limits]
    assert all(each == done[0] for each in done)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([1], "schema: expected a JSON schema, as a mapping, found [1]"),
        ({"type": "thing"}, "schema: expected one that llguidance can follow, found a problem: Invalid type: thing"),
        ({"not": {}}, 'Unimplemented keys: ["not"]'),
        ({"type": "string", "pattern": "("}, "regex parse error: ( ^ error: unclosed group"),
        ({"enum": []}, "Unsatisfiable schema: anyOf is empty"),
        ({"$ref": "#"}, "the vocabulary has no token that continues the text"),
        ({"$ref": "http://host/schema"}, "Default retriever does not fetch resources"),
        ({"const": float("nan")}, "schema: expected JSON values: Out of range float values"),
        ({"const": {1}}, "schema: expected JSON values: Object of type set"),
        ({"const": "\ud800"}, "schema: expected JSON, found something else (half of a character"),
        ({"const": "x" * 70_000}, "schema: expected at most 65536 characters, found 70"),
        ({"x-guidance": {"lenient": True}}, "schema: expected keywords of JSON schema, found x-guidance"),
        ({"type": "integer", "multipleOf": 1_000_003}, "found a problem: it takes more than 1 s, or too much memory"),
    ],
)
def test_a_schema_that_is_refused(schema: Any, message: str) -> None:
    with pytest.raises(DynexportError) as refused:
        Constraint.json_schema(TEXT, schema)
    assert message in str(refused.value)
    assert str(refused.value).startswith("schema: ")
    assert "\n" not in str(refused.value) and "llguidance {" not in str(refused.value)


def test_a_schema_that_is_nested_too_deep() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(DynexportError, match=r"schema: expected JSON, found .* .more than 64 levels"):
        Constraint.json_schema(TEXT, schema)
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(DynexportError, match=r"schema: expected JSON values: .*recursion"):
        Constraint.json_schema(TEXT, schema)


def test_a_schema_that_grows_too_complex_ends_its_row_in_one_line() -> None:
    """Its first step has 30,000 ways to go on. llguidance finds out when the text goes on, or when it compiles."""
    kinds = [[{"properties": {f"{i}{j}": {"type": "integer"}}, "type": "object"} for j in range(6)] for i in range(4)]
    schema = {"type": "object", "allOf": [{"anyOf": each} for each in kinds]}
    with pytest.raises(DynexportError, match=r"^schema: .*items; max is 2000|^schema: .*more than 1 s") as refused:
        answer(Constraint.json_schema(TEXT, schema), random_logits(1), Sampling())
    assert "\n" not in str(refused.value)


def test_a_token_that_is_not_allowed_is_refused() -> None:
    limit = Constraint.json_schema(TEXT, {"const": 7})
    with pytest.raises(DynexportError, match=r"^schema: "):
        limit.push(*TEXT.encode("8"))


def test_a_vocabulary_that_cannot_write_the_text(generator: Model) -> None:
    with pytest.raises(DynexportError, match="no token that continues the text"):
        generator.generate([5, 6], schema={"type": "object"})


def test_a_bundle_without_a_tokenizer(short: Model) -> None:
    with pytest.raises(DynexportError, match="has no tokenizer"):
        short.generate([5, 6], schema={"type": "object"})


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DynexportError, match=r"llguidance is needed to .* pip install 'dynexport\[structured\]'"):
        Constraint.json_object(text_of(KINDS["byte level"]))


def test_a_forbidden_token_is_an_error_of_its_row() -> None:
    limit = Constraint.json_schema(TEXT, {"const": 7})
    (seven,) = TEXT.encode("7")
    row = RowSampler(Sampling(suppress_tokens=(seven,)), constraint=limit)
    with pytest.raises(DynexportError, match="row 0: expected a token that may be generated"):
        choose(random_logits(1)()[None], [row])


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_the_bytes_of_tokens_are_those_that_llguidance_reads(kind: str) -> None:
    tokenizer: Tokenizer = KINDS[kind]
    theirs = llguidance.LLTokenizer(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    for token, found in enumerate(TEXTS[kind].token_bytes()):
        if token not in added and tokenizer.id_to_token(token) != "<unk>" and found != b"\xff":  # their own mark
            assert found == theirs.decode_bytes([token]), tokenizer.id_to_token(token)
        elif token in added and added[token].special:
            assert found == b""


def test_the_bytes_of_tokens_with_a_space_before_them() -> None:
    tokenizer = KINDS["metaspace"]
    names = map(tokenizer.id_to_token, range(tokenizer.get_vocab_size()))
    words = dict(zip(names, TEXTS["metaspace"].token_bytes(), strict=True))
    assert (words["▁the"], words["▁"], words["好"], words["</s>"]) == (b" the", b" ", "好".encode(), b"")


# Token ids that end a request.


def test_a_stop_token_ends_a_row_and_is_not_text(generator: Model) -> None:
    free = generator.generate([5, 6, 7], max_new_tokens=8)
    stop = free.ids[3]
    row = generator.generate([5, 6, 7], max_new_tokens=8, stop_token_ids=[stop])
    until = free.ids.index(stop)
    assert (row.ids, row.finish_reason, row.stop_reason) == (free.ids[: until + 1], "stop", stop)
    assert row.text == free.text[:until]
    later = generator.generate([5, 6, 7], max_new_tokens=8, stop_token_ids=[stop], sampling=Sampling(min_new_tokens=8))
    assert stop not in later.ids


def test_a_stop_token_never_cuts_a_schema(generator: Model) -> None:
    (comma,) = generator.text.encode(",")
    with pytest.raises(DynexportError, match="row 0: expected a token that may be generated"):
        generator.generate([5, 6], schema={"const": [0, 1]}, stop_token_ids=[comma])


@pytest.mark.parametrize("ids", [[-1], [89], ["a"], 7, [True]])
def test_stop_tokens_that_are_none(generator: Model, ids: Any) -> None:
    with pytest.raises(DynexportError, match=r"^stop_token_ids: expected"):
        generator.generate([5, 6], stop_token_ids=ids)
