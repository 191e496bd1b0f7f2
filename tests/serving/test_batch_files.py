"""A batch's files: lines of any length, ids, and answers that survive a kill in the middle of a line."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.serving.batch import answers as answers_module
from dynexport.runtime.serving.batch.answers import Answers
from dynexport.runtime.serving.batch.lines import bounded_lines
from dynexport.runtime.serving.batch.requests import BadLine, Requests, parse_request

MAKER, OTHER = "a" * 64, "b" * 64


def text(name: str, **fields: Any) -> str:
    wanted = {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}} | fields
    return json.dumps({field: value for field, value in wanted.items() if value is not None})


def requests_of(path: Path, *lines: str) -> Requests:
    path.write_text("".join(f"{line}\n" for line in lines))
    return Requests.scan(path)


@given(st.binary(max_size=60).map(lambda data: data.replace(b"\x01", b"\n")), st.integers(1, 12))
def test_lines_are_those_of_the_file_and_long_ones_are_skipped(data: bytes, most: int) -> None:
    wanted = io.BytesIO(data).readlines()
    found = list(bounded_lines(io.BytesIO(data), most))
    assert [line.number for line in found] == list(range(1, len(wanted) + 1))
    assert [line.whole for line in found] == [line.endswith(b"\n") for line in wanted]
    assert [line.start for line in found] == [sum(map(len, wanted[:i])) for i in range(len(wanted))]
    stripped = [line.removesuffix(b"\n") for line in wanted]
    assert [line.content for line in found] == [line if len(line) <= most else None for line in stripped]


def test_requests_are_counted_and_blank_lines_are_none(tmp_path: Path) -> None:
    requests = requests_of(tmp_path / "in", text("a"), "", "not JSON", "  ", text("b"))
    assert (requests.count, requests.last) == (3, 5)
    assert [line.number for line in requests.lines()] == [1, 3, 5]


@pytest.mark.parametrize("second", [text("a"), text("a", method="GET"), text("a", body=None)])
def test_an_id_that_is_there_twice_is_refused_with_both_lines(tmp_path: Path, second: str) -> None:
    with pytest.raises(DynexportError, match=r"line 4: expected a custom_id of its own, found that of line 2"):
        requests_of(tmp_path / "in", text("c"), text("a"), text("b"), second, text("c"))


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    requests = requests_of(tmp_path / "in", text("a"), text("b"))
    (tmp_path / "in").write_text(text("a"))
    with pytest.raises(DynexportError, match="found the file changed"):
        list(requests.lines())
    requests = requests_of(tmp_path / "in", text("a"), text("b"))
    lines = requests.lines()
    next(lines)
    (tmp_path / "in").write_text(text("a") * 3)
    with pytest.raises(DynexportError, match="found the file changed"):
        list(lines)


BAD = {
    "no JSON": ("{", "line 1: expected JSON", None),
    "no object": ("[]", "line 1: expected a JSON object, found list", None),
    "no id": (text("a", custom_id=None), "line 1: custom_id: Field required", None),
    "an empty id": (text(""), "line 1: custom_id: String should have at least 1 character", None),
    "a number as id": (text("a", custom_id=7), "line 1: custom_id: Input should be a valid string", None),
    "another method": (text("a", method="GET"), "line 1: method: Input should be 'POST'", "a"),
    "another url": (text("a", url="/v1/embeddings"), "line 1: url: Input should be '/v1/chat/completions' or", "a"),
    "no body": (text("a", body=None), "line 1: body: Field required", "a"),
    "an unknown field": (text("a", more=1), "line 1: more: Extra inputs are not permitted", "a"),
}


@pytest.mark.parametrize(("line", "message", "custom_id"), BAD.values(), ids=BAD)
def test_a_bad_line_says_what_is_wrong(line: str, message: str, custom_id: str | None) -> None:
    (found,) = bounded_lines(io.BytesIO(line.encode()), 1000)
    with pytest.raises(BadLine) as raised:
        parse_request(found)
    assert str(raised.value).startswith(message)
    assert raised.value.custom_id == custom_id


@settings(deadline=None)
@given(st.data())
def test_answers_survive_a_cut_at_any_byte(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The file is cut anywhere, and may have anything but a line break after that: the rest is answered once."""
    home = tmp_path_factory.mktemp("cut")
    requests = requests_of(home / "in", *(text(name) for name in "abcdef"))
    order = data.draw(st.permutations(range(1, 7)))
    written = Answers(home / "out", requests, MAKER)
    for number in order:
        written.append(number, "abcdef"[number - 1], {"body": {"text": "é\n" * number}})
    written.close()
    whole = (home / "out").read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    tail = (
        data.draw(st.sampled_from([b"", b"\0" * 9, b'{"id": "batch', b"\xff"])) if whole[:cut].endswith(b"\n") else b""
    )
    (home / "out").write_bytes(whole[:cut] + tail)
    again = Answers(home / "out", requests, MAKER)
    assert [again.has(number) for number in order] == [place < again.count for place in range(6)]
    assert again.count == whole[:cut].count(b"\n")
    for number in order[again.count :]:
        again.append(number, "abcdef"[number - 1], {"body": {"text": "é\n" * number}})
    again.close()
    assert (home / "out").read_bytes() == whole


def test_an_output_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    requests = requests_of(tmp_path / "in", text("a"), text("b"))
    out = tmp_path / "out"
    written = Answers(out, requests, MAKER)
    with pytest.raises(DynexportError, match="expected a file of this process alone"):
        Answers(out, requests, MAKER)
    written.append(1, "a", None)
    written.close()
    content = out.read_bytes()
    others = requests_of(tmp_path / "other", text("a"), text("c"))
    cases = [
        (content, others, MAKER, "line 1: expected an answer to .*other, found one to other requests"),
        (content, requests, OTHER, "line 1: expected an answer of the same bundle with the same options"),
        (content * 2, requests, MAKER, "line 2: expected one answer for each request, found another for line 1"),
        (b"mine\n", requests, MAKER, "line 1: expected JSON"),
        (b'{"id": "1"}\n', requests, MAKER, "line 1: expected an answer of this command, found another id"),
    ]
    for before, asked, maker, message in cases:
        out.write_bytes(before)
        with pytest.raises(DynexportError, match=message):
            Answers(out, asked, maker)
        assert out.read_bytes() == before
    for path, message in ((tmp_path, "found: Is a directory"), (Path("/dev/null"), "read again, found a device")):
        with pytest.raises(DynexportError, match=message):
            Answers(path, requests, MAKER)


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = requests_of(tmp_path / "in", text("a"), text("b"))
    written = Answers(tmp_path / "out", requests, MAKER)
    written.append(1, "a", None)
    content, write = (tmp_path / "out").read_bytes(), os.write

    def full(file: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(28, "No space left on device")
        return write(file, data[:-10])

    monkeypatch.setattr(answers_module.os, "write", full)
    with pytest.raises(DynexportError, match="expected to write an answer, found: No space left on device"):
        written.append(2, "b", None)
    assert (tmp_path / "out").read_bytes() == content and not written.has(2)
    written.close()
