"""JSON from elsewhere: what is none, and what is some but would fail later on, is one line."""

from __future__ import annotations

import pytest

from dynexport.runtime.bundle.errors import DynexportError, one_line
from dynexport.runtime.bundle.json_text import parse_json, parse_json_object

REFUSED = {
    "empty": (b"", "Expecting value"),
    "cut": (b'{"a": [1', "Expecting ',' delimiter"),
    "no UTF-8": (b'"\xff"', "can't decode byte 0xff"),
    "endless lists": (b"[" * 100_000, "more than 64 levels"),
    "endless objects": (b'{"a":' * 100_000, "more than 64 levels"),
    "deep": (b"[" * 65 + b"1" + b"]" * 65, "more than 64 levels"),
    "twice": (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b"[-Infinity]", "-Infinity is no number"),
    "a huge float": (b"1e999", "1e999 is too large a number"),
    "a huge integer": (b"1" * 5000, "a number of 5000 digits"),
    "half a character": (b'["a\\ud800"]', "half of a character"),
    "half a character alone": (b'"\\udc00"', "half of a character"),
    "half a character in a key": (b'{"\\ud800": 1}', "half of a character"),
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(content: bytes, problem: str) -> None:
    with pytest.raises(DynexportError) as caught:
        parse_json(content, "config.json", "download it again")
    message = str(caught.value)
    assert message.startswith("config.json: expected JSON, found something else (") and problem in message
    assert message.endswith("; download it again") and message.isprintable() and len(message) < 300


def test_what_is_taken() -> None:
    whole = b'\xef\xbb\xbf{"a": [1, -2.5, null, true, "\\ud83d\\ude00"], "most": 1000000000000000019884624838656}'
    assert parse_json_object(whole, "x") == {"a": [1, -2.5, None, True, "😀"], "most": 1000000000000000019884624838656}
    assert parse_json(b"[" * 64 + b"]" * 64, "x")
    with pytest.raises(DynexportError, match="x: expected a JSON object, found list"):
        parse_json_object(b"[]", "x")


def test_an_error_is_one_line_that_ends() -> None:
    assert one_line("a\nb\x1b[31m\u202e") == "a\\nb\\x1b[31m\\u202e"
    for endless in ("x" * 10**6, "\x1b" * 10**6, "\U0001f600\u202e" * 10**5):
        line = str(DynexportError(f"model.gguf: tensor {endless}: download it again"))
        assert line.startswith("model.gguf: tensor ") and line.endswith(": download it again")
        assert line.isprintable() and len(line) <= 900
