"""The C interface gives what Python gives, refuses what Python refuses, and lets no exception out."""

from __future__ import annotations

import ctypes as c
import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundles import CONFORMANCE, ids_bundle, skip_bundle  # noqa: F401 - fixtures
from c_interface import CANCELLED, ROUTE_ERROR, Backend, Library, Opened, Options, Refused, Token
from conftest import BUILD, LIBRARY

from dynexport.exporter.bundle.conversion import convert
from dynexport.runtime import Bundle, DynexportError, Model, Sampling
from dynexport.runtime.bundle.errors import RouteError

PROMPT = "Hello, World"


@pytest.fixture(scope="module")
def library() -> Library:
    path = BUILD / "libdynexport.so"
    if not path.exists() or "DYNEXPORT_SANITIZE:STRING=\n" not in (BUILD / "CMakeCache.txt").read_text():
        pytest.skip("not built as a shared library without sanitizers")
    return Library(path)


@pytest.fixture(scope="module")
def opened(library: Library, skip_bundle: Path) -> Iterator[Opened]:  # noqa: F811
    found = library.open(skip_bundle, library=str(LIBRARY).encode(), threads=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def model(skip_bundle: Path) -> Model:  # noqa: F811
    return Model(Bundle.open(skip_bundle), threads=1)


def test_versions(library: Library) -> None:
    version, number = c.c_char_p(), c.c_int32()
    library.call("version", c.byref(version))
    library.call("abi", c.byref(number))
    assert version.value == b"0.1.0"
    assert (BUILD / f"libdynexport.so.{number.value}").exists()


def test_a_model(opened: Opened, model: Model) -> None:
    sizes = model.bundle.manifest.model
    assert (opened.number("vocab_size"), opened.number("max_length")) == (sizes.vocab_size, sizes.max_length)
    assert opened.depths() == ["full", "2"]


def test_text(opened: Opened, model: Model) -> None:
    ids = opened.encode(PROMPT)
    assert ids == model.text.encode(PROMPT)
    assert opened.decode(ids) == PROMPT
    assert opened.encode("") == [] and opened.decode([]) == ""
    messages = [{"role": "user", "content": "Hi"}]
    assert opened.ids("chat", json.dumps(messages).encode(), None) == model.text.chat(messages)
    with pytest.raises(Refused):
        opened.ids("chat", b"[", None)


@pytest.mark.parametrize("depth", [None, "full", "2"])
def test_greedy(opened: Opened, model: Model, depth: str | None) -> None:
    ids = opened.encode(PROMPT)
    answer = opened.generate(ids, max_new_tokens=24, depth=depth and depth.encode(), logprobs=1)
    expected = model.generate(ids, max_new_tokens=24, depth=depth, sampling=Sampling(logprobs=0))
    assert (answer.ids, answer.text) == (expected.ids, expected.text)
    assert answer.logprobs == pytest.approx([token.logprob for token in expected.logprobs], abs=1e-6)
    assert set(answer.layers[1:]) == {8 if depth == "full" else 4}
    assert answer.finish == (1 if expected.finish_reason == "stop" else 2)


def test_drafts(opened: Opened, model: Model) -> None:
    ids = opened.encode(PROMPT)
    plain = opened.generate(ids, max_new_tokens=24, depth=b"full")
    for fields in ({"speculate": 4}, {"speculate": 4, "draft": b"2"}):
        assert opened.generate(ids, max_new_tokens=24, depth=b"full", **fields).ids == plain.ids
    for fields, message in (
        ({"speculate": 65}, "speculate: expected 1..64, found 65"),
        ({"speculate": -1}, "speculate: expected 1..64, found -1"),
        ({"speculate": 4, "draft": b"7"}, "7"),
        ({"draft": b"2"}, "draft: expected with speculate"),
    ):
        with pytest.raises(Refused, match=message):
            opened.generate(ids, **fields)


def test_sampled(opened: Opened, model: Model) -> None:
    ids = opened.encode(PROMPT)
    how = {"temperature": 1.5, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "min_new_tokens": 4, "seed": 7}
    bias = (c.c_int64 * 2)(3, 5), (c.c_double * 2)(2.5, -100.0)
    answer = opened.generate(ids, max_new_tokens=20, has_seed=1, bias_ids=bias[0], biases=bias[1], bias_count=2, **how)
    assert (
        answer.ids
        == model.generate(ids, max_new_tokens=20, sampling=Sampling(logit_bias={3: 2.5, 5: -100.0}, **how)).ids
    )
    assert all(math.isnan(logprob) for logprob in answer.logprobs)


def test_ends(opened: Opened, model: Model) -> None:
    ids = opened.encode(PROMPT)
    whole = opened.generate(ids, max_new_tokens=16, depth=b"full")
    stops = (c.c_int64 * 1)(whole.ids[5])
    cut = opened.generate(ids, max_new_tokens=16, depth=b"full", stop_ids=stops, stop_ids_count=1)
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[5]) + 1] and cut.finish == 1
    texts = (c.c_char_p * 1)(whole.text[4:6].encode())
    stopped = opened.generate(ids, max_new_tokens=16, depth=b"full", stop=texts, stop_count=1)
    assert stopped.text == whole.text[: whole.text.index(whole.text[4:6])] and stopped.finish == 1
    seen: list[int] = []

    def twice(count: int) -> bool:
        seen.append(count)
        return count < 2

    with pytest.raises(Refused) as caught:
        opened.generate(ids, twice)
    assert caught.value.status == CANCELLED and seen == [1, 2]


def test_threads_share_a_model(opened: Opened) -> None:
    prompts = [opened.encode(text) for text in ("a", "bc", "def", "ghij")]
    expected = [opened.generate(ids, max_new_tokens=12).ids for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda ids: opened.generate(ids, max_new_tokens=12).ids, prompts)) == expected


def test_what_python_refuses(opened: Opened, model: Model) -> None:
    ids = opened.encode(PROMPT)
    options = ({"temperature": -1.0}, {"top_k": -1}, {"top_p": 2.0}, {"min_p": -0.5}, {"repetition_penalty": 0.0})
    for fields in options:
        with pytest.raises(DynexportError) as expected:
            model.generate(ids, sampling=Sampling(**fields))
        with pytest.raises(Refused) as caught:
            opened.generate(ids, **fields)
        assert (caught.value.status, str(caught.value)) == (2, str(expected.value))
    with pytest.raises(DynexportError) as expected:
        model.generate(ids, depth="7")
    with pytest.raises(Refused) as caught:
        opened.generate(ids, depth=b"7")
    assert (caught.value.status, str(caught.value)) == (2, str(expected.value))
    with pytest.raises(Refused, match="max_new_tokens: expected at least 1, found 0"):
        opened.generate(ids, max_new_tokens=0)
    for prompt in ([], [-1], [89]):
        with pytest.raises(DynexportError):
            model.generate([prompt])
        with pytest.raises(Refused):
            opened.generate(prompt)


def test_a_route_error(library: Library, tmp_path: Path) -> None:
    convert(CONFORMANCE / "mod-overflow", tmp_path / "bundle", golden=False)
    manifest = tmp_path / "bundle" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"overflow": "residual"', '"overflow": "error"'))
    python = Model(Bundle.open(tmp_path / "bundle"), threads=1)
    cpp = library.open(tmp_path / "bundle", library=str(LIBRARY).encode(), threads=1)
    prompt = list(range(1, 33))
    with pytest.raises(RouteError) as expected:
        python.generate([prompt], max_new_tokens=64)
    with pytest.raises(Refused) as caught:
        cpp.generate(prompt, max_new_tokens=64)
    assert (caught.value.status, str(caught.value)) == (ROUTE_ERROR, str(expected.value))
    cpp.close()


def test_wrong_calls(library: Library, opened: Opened, skip_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    with pytest.raises(Refused, match=r"expected a bundle with a manifest.json, found none; make one with"):
        library.open(tmp_path)
    with pytest.raises(Refused, match=r"backend: expected onnxruntime, .* found 'x'"):
        library.open(skip_bundle, kind=b"x")
    ids, size = c.POINTER(c.c_int64)(), c.c_size_t()
    for name, arguments in (
        ("version", (None,)),
        ("open", (None, None, None)),
        ("encode", (None, b"x", c.c_size_t(1), c.byref(ids), c.byref(size))),
        ("encode", (opened.model, None, c.c_size_t(1), c.byref(ids), c.byref(size))),
        ("encode", (opened.model, b"x", c.c_size_t(1), None, c.byref(size))),
        ("decode", (opened.model, None, c.c_size_t(1), c.byref(ids), c.byref(size))),
        ("generate", (opened.model, None, c.c_size_t(1), None, None, None)),
        ("options_init", (None, c.c_size_t(8))),
    ):
        with pytest.raises(Refused, match="expected an address, found none"):
            library.call(name, *arguments)
    with pytest.raises(Refused, match="UTF-8"):
        opened.ids("encode", b"\xff", c.c_size_t(1))
    library.call("free", None)
    library.call("close", None)


def test_callers_of_other_versions(library: Library, opened: Opened) -> None:
    """An older caller's struct ends earlier; what it lacks has its default. A newer one's is refused."""
    older = Options(temperature=-5.0, logprobs=9)
    library.call("options_init", c.byref(older), c.c_size_t(Options.depth.offset))
    assert (older.size, older.max_new_tokens, older.temperature, older.logprobs) == (Options.depth.offset, 128, -5.0, 9)
    library.call("recommend", opened.model, c.byref(older))
    assert (older.temperature, older.logprobs) == (-5.0, 9)
    for structure, name in ((Options, "options"), (Backend, "backend")):
        for size in (0, c.sizeof(structure) + 8):
            with pytest.raises(Refused, match=f"{name}: size: expected at most {c.sizeof(structure)}, found {size}"):
                library.call(f"{name}_init", c.byref(structure()), c.c_size_t(size))
    assert c.sizeof(Token) == 56
