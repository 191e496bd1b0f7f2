"""What generation_config.json recommends: transformers' rules, and what is named because it is not done."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dynexport.runtime import DynexportError, Sampling
from dynexport.runtime.generation.generation_config import read_generation_config


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.6, "eos_token_id": [1, 2]}, Sampling()),
        ({"do_sample": False, "top_k": 20, "top_p": 0.9}, Sampling(top_k=20, top_p=0.9)),
        ({"do_sample": True}, Sampling(temperature=1.0, top_k=50)),
        ({"do_sample": True, "top_k": 0, "temperature": 0.7}, Sampling(temperature=0.7)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1},
            Sampling(temperature=0.6, top_p=0.95, top_k=20, min_p=0.1),
        ),
        ({"do_sample": True, "top_k": -1}, Sampling(temperature=1.0)),
        ({"repetition_penalty": 1.3}, Sampling(repetition_penalty=1.3)),
        ({"bad_words_ids": [[1], [2, 3]], "typical_p": 0.9}, Sampling(bad_words_ids=((1,), (2, 3)), typical_p=0.9)),
        (
            {"min_new_tokens": 4, "no_repeat_ngram_size": 3, "suppress_tokens": [5], "begin_suppress_tokens": [6, 7]},
            Sampling(min_new_tokens=4, no_repeat_ngram_size=3, suppress_tokens=(5,), begin_suppress_tokens=(6, 7)),
        ),
        ({"do_sample": True, "temperature": None, "top_p": None}, Sampling(temperature=1.0, top_k=50)),
    ],
)
def test_sampling(fields: dict[str, Any], expected: Sampling) -> None:
    assert read_generation_config(json.dumps(fields).encode()).sampling == expected


def test_what_is_not_done_is_named_and_what_changes_nothing_is_not() -> None:
    asked = {"min_length": 3, "num_beams": 4, "sequence_bias": [[[1], 2.0]], "max_new_tokens": 9, "use_cache": True}
    harmless = {
        "repetition_penalty": 1,
        "typical_p": 1.0,
        "bad_words_ids": None,
        "eta_cutoff": 0.0,
        "force_words_ids": [],
    }
    found = read_generation_config(json.dumps(asked | harmless).encode()).left_out
    assert found == ("min_length 3", "num_beams 4", "sequence_bias [[[1], 2.0]]")


@pytest.mark.parametrize(("value", "expected"), [("END", ("END",)), (["a", "b"], ("a", "b")), (None, ())])
def test_stop_strings(value: Any, expected: tuple[str, ...]) -> None:
    assert read_generation_config(json.dumps({"stop_strings": value}).encode()).stop == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "generation_config.json: expected a JSON object, found list"),
        (b"{", "generation_config.json: expected JSON"),
        (b'{"do_sample": "yes"}', "do_sample: expected true or false, found 'yes'"),
        (b'{"do_sample": true, "temperature": "hot"}', "temperature: expected a finite number >= 0, found 'hot'"),
        (b'{"bad_words_ids": [3]}', "bad_words_ids: expected a list of token ids, found 3"),
        (b'{"min_new_tokens": -1}', "min_new_tokens: expected at least 0, found -1"),
        (b'{"top_p": 7}', "top_p: expected 0 < top_p <= 1, found 7"),
        (b'{"stop_strings": [""]}', "stop_strings: expected text or several"),
    ],
)
def test_what_cannot_be_used(content: bytes, expected: str) -> None:
    with pytest.raises(DynexportError) as caught:
        read_generation_config(content)
    assert str(caught.value).startswith("generation_config.json") and expected in str(caught.value)
