"""Damaged tokenizers and templates: an answer or an error in time, never a crash. Run it with sanitizers, too."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from conftest import Run
from family_tokenizers import family_tokenizer
from test_chat_template import CONVERSATIONS, TEMPLATES, TOKENS, VARIABLES
from test_chat_template import answers as chat_answers
from test_tokenizer import answers

PIECES = (Path(__file__).parent / "templates" / "pieces.txt").read_text().splitlines()
TEXTS = ["Hello  world, it's 12 o'clock\n\t你好 👋🏽", "<|im_start|>a <|im_end|>", "", " ", "\x00\ufffd", "a" * 300]
VALUES: list[Any] = [None, True, -1, 0, 1 << 40, 1.5, "", "a", "\u2581", "(a+)+$", "[", [], [1], {}, {"type": "NFC"}]


def places(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """Return containers with the keys in them, vocabularies and merges only in part."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in list(keys)[:40]:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            places(value[key], found, depth + 1)
    return found


def damaged(draw: random.Random, text: str) -> str:
    state = json.loads(text)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(places(state, []))
        kind = draw.random()
        if kind < 0.3:
            del container[key]
        elif kind < 0.6:
            container[key] = draw.choice(VALUES)
        else:
            other, name = draw.choice(places(state, []))
            container[key] = json.loads(json.dumps(other[name]))
        if not state:
            break
    changed = json.dumps(state)
    if draw.random() < 0.1:
        cut = draw.randrange(len(changed))
        changed = changed[:cut] + draw.choice(["", '"', "[" * 5000, "\x00"]) + changed[cut + draw.randint(0, 9) :]
    return changed


def test_damaged_tokenizers(run: Run) -> None:
    draw = random.Random(5)
    names = ("smollm2", "qwen2", "llama2", "mistral", "gemma2", "metaspace", "compatible", "opt")
    texts = [family_tokenizer(name).to_str() for name in names]
    tasks = [
        {"tokenizer": damaged(draw, draw.choice(texts)), "encode": TEXTS, "decode": [[0, 5, 9, 1 << 40, -1, 300, 2]]}
        for _ in range(500)
    ]
    found = answers(run, tasks, timeout=300)
    refused = sum("error" in answer for answer in found)
    assert 100 < refused < 500
    assert all("\n" not in answer["error"] for answer in found if "error" in answer)


def test_patterns_that_never_end_are_stopped(run: Run) -> None:
    state = json.loads(family_tokenizer("llama3").to_str())
    tasks = []
    for pattern in (r"(a+)+$", r"(a|a)*b", r"(?:(?:a*)*)*c", r"((a{0,99}){0,99}){0,99}", r"(?=(a+)+b)", "(" * 2000):
        state["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}
        tasks.append({"tokenizer": json.dumps(state), "encode": ["a" * 5000, "a" * 40 + "!"]})
    found = answers(run, tasks, timeout=120)
    assert sum("error" in answer for answer in found) >= 3


def mutated(draw: random.Random, text: str) -> str:
    symbols = [
        "{%",
        "%}",
        "{{",
        "}}",
        "{#",
        "-",
        "|",
        "(",
        ")",
        "[",
        "]",
        "'",
        "\\",
        ":",
        "if ",
        "for ",
        "set ",
        "é",
        "\0",
    ]
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(text) + 1)
        end = min(len(text), at + draw.randint(0, 12))
        kind = draw.random()
        if kind < 0.4:
            text = text[:at] + text[end:]
        elif kind < 0.7:
            text = text[:at] + draw.choice(symbols) + text[at:]
        else:
            other = draw.randrange(len(text) + 1)
            text = text[:at] + text[other : other + draw.randint(1, 60)] + text[end:]
    return text


def test_damaged_templates(run: Run) -> None:
    draw = random.Random(6)
    sources = [*TEMPLATES.values(), *PIECES]
    conversations = [*CONVERSATIONS[:3], CONVERSATIONS[8], [CONVERSATIONS[0][0], True, VARIABLES]]
    tasks = [
        {"template": mutated(draw, draw.choice(sources)), "globals": TOKENS, "conversations": conversations}
        for _ in range(500)
    ]
    found = chat_answers(run, tasks, timeout=300)
    assert sum(isinstance(answer, dict) for answer in found) > 50
    assert sum(isinstance(answer, list) for answer in found) > 50
