"""Mutated manifests and graphs: C++ does not crash, and accepts and refuses what Python does."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import onnx
import pytest
from bundles import CONFORMANCE, skip_bundle  # noqa: F401 - a fixture
from conftest import Run

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import DynexportError
from dynexport.runtime.bundle.bundle import _tensors, parse_manifest

COUNT = 500
PUT = (
    b"",
    b"\0",
    b"\xff" * 8,
    b"9" * 30,
    b"[" * 2000,
    b'"',
    b"}",
    b"{",
    b"\x80",
    b"\n",
    b"-",
    b"1e999",
    b"\\ud800",
    b",",
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e300, -1e-300),
    *(
        "",
        "x",
        "x" * 2000,
        "\x1b[31m",
        "\u202e",
        "../x",
        "a\0b",
        "1",
        "inf",
        "dense",
        "B",
        "it's",
        "\U000e0001",
        "\ue000",
    ),
    *([], {}, [[]], [0, 0], {"": 0}, [-1], [10**30], {"a": {"a": {"a": {}}}}, "full", "hops", "layers", "M_routed"),
)
Changed = tuple[str, bytes]


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """Content with a few bytes flipped, overwritten, cut out or put in, or without its end."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, length = draw.randrange(len(changed)), draw.choice([0, 1, 2, 8, 64])
        kind = draw.randrange(4)
        if kind == 0:
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + length] = draw.choice(PUT)
        elif kind == 2:
            changed[place : place + length] = draw.randbytes(length)
        elif draw.random() < 0.3:
            del changed[max(place, 1) :]
    return bytes(changed)


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every place in JSON."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def mutated_json(draw: random.Random, fields: Any) -> bytes:
    """JSON with a few of its values replaced, removed, put twice, or put where others were."""
    value = copy.deepcopy(fields)
    for _ in range(draw.randint(1, 3)):
        *way, last = draw.choice(places(value)[1:])
        parent = value
        for key in way:
            parent = parent[key]
        kind = draw.randrange(4)
        if kind < 2:
            parent[last] = copy.deepcopy(draw.choice(VALUES))
        elif isinstance(parent, list):
            parent.insert(draw.randint(0, len(parent)), copy.deepcopy(parent[last]))
        elif kind == 2:
            del parent[last]
        else:
            parent[draw.choice(["", "x", "\u2028", *map(str, parent)])] = copy.deepcopy(parent[last])
    return json.dumps(value, ensure_ascii=draw.random() < 0.5).encode()


def shortened(line: str) -> str:
    """A line without the last digits of a number: beyond 64 bits, C++ has the nearest in floating point."""
    return re.sub(r"found (-?\d)[\d.e+]*", r"found \1..", line)


def read_by_python(content: bytes) -> str:
    try:
        parse_manifest(content, "manifest.json")
    except DynexportError as error:
        return str(error)
    return "ok"


def read_by_cpp(run: Run, contents: list[bytes], *arguments: str) -> list[str]:
    ran = run("probe_bundle", *arguments, stdin=b"".join(b"%d\n%s" % (len(content), content) for content in contents))
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines: list[str] = ran.stdout.decode().splitlines()
    assert len(lines) == len(contents)
    return lines


@pytest.fixture(scope="module")
def manifests(skip_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:  # noqa: F811
    """Manifests of three strategies."""
    found = [skip_bundle]
    for case in ("mod-router", "radial-layer"):
        found.append(tmp_path_factory.mktemp("hostile") / case)
        convert(CONFORMANCE / case, found[-1], golden=False)
    return [(bundle / "manifest.json").read_bytes() for bundle in found]


def test_mutated_bytes(manifests: list[bytes], run: Run) -> None:
    draw = random.Random(14)
    contents = [mutated_bytes(draw, draw.choice(manifests)) for _ in range(COUNT)]
    found, expected = read_by_cpp(run, contents), [read_by_python(content) for content in contents]
    disagreed = [pair for pair in zip(expected, found, strict=True) if (pair[0] == "ok") != (pair[1] == "ok")]
    assert not disagreed
    assert 10 < expected.count("ok") < COUNT - 100


def test_mutated_json(manifests: list[bytes], run: Run) -> None:
    draw = random.Random(41)
    originals = [json.loads(content) for content in manifests]
    contents = [mutated_json(draw, draw.choice(originals)) for _ in range(COUNT)]
    found, expected = read_by_cpp(run, contents), [read_by_python(content) for content in contents]
    disagreed = [pair for pair in zip(expected, found, strict=True) if (pair[0] == "ok") != (pair[1] == "ok")]
    assert not disagreed
    assert 10 < expected.count("ok") < COUNT - 100
    other_words = [pair for pair in zip(expected, found, strict=True) if shortened(pair[0]) != shortened(pair[1])]
    assert not other_words


def test_what_an_error_quotes(manifests: list[bytes], run: Run) -> None:
    draw = random.Random(7)
    fields = json.loads(manifests[0])
    texts = [chr(code) for code in (0, 9, 10, 13, 27, 127, 0x85, 0xA0, 0xAD, 0x2028, 0x3000, 0xFEFF, 0xE000, 0x1F600)]
    texts += [
        "'",
        '"',
        "'\"",
        "\\",
        "é" * 1000,
        "\x1b" * 1000,
        "😀" * 500,
        *("".join(draw.choices(texts, k=90)) for _ in range(40)),
    ]
    contents = []
    for text in texts:
        contents.append(json.dumps(fields | {"target": text}).encode())
        contents.append(json.dumps(fields | {text: text}).encode())
        contents.append(json.dumps(fields | {"routing": {"kind": text * 20}}).encode())
        contents.append(json.dumps(fields | {"schema_version": text * 20}).encode())
    assert read_by_cpp(run, contents) == [read_by_python(content) for content in contents]


def locations(content: bytes) -> list[str] | None:
    """External data of a graph, by onnx; None where it refuses the file."""
    try:
        model = onnx.load_model_from_string(content)
    except Exception:  # protobuf raises its own classes
        return None
    values = [entry.value for tensor in _tensors(model) for entry in tensor.external_data if entry.key == "location"]
    return sorted(known(value.decode(errors="replace") if isinstance(value, bytes) else value) for value in values)


def known(text: str) -> str:
    """A text without what stands for bytes that are not UTF-8, of which libraries write different numbers."""
    return text.replace("\ufffd", "")


def test_mutated_graphs(skip_bundle: Path, run: Run) -> None:  # noqa: F811
    """A file that onnx reads has the external data that onnx finds there: no mutation hides any."""
    draw = random.Random(77)
    model = onnx.load(skip_bundle / "model.onnx", load_external_data=False)
    original = model.SerializeToString()
    tensors = b"".join(len(part := t.SerializeToString()).to_bytes(2, "big") + part for t in model.graph.initializer)
    contents = [original, b"", tensors, *(mutated_bytes(draw, original) for _ in range(COUNT))]
    small = onnx.ModelProto()
    small.graph.initializer.extend(model.graph.initializer[:3])
    contents += [mutated_bytes(draw, small.SerializeToString()) for _ in range(COUNT)]
    found = read_by_cpp(run, contents, "graphs")
    read = 0
    for content, line in zip(contents, found, strict=True):
        expected = locations(content)
        if expected is not None:
            read += 1
            assert sorted(map(known, json.loads(line))) == expected
    assert json.loads(found[0])
    assert read > COUNT // 4
