"""The C++ runtime checks its tokenizer and chat template by what a bundle ships, and refuses where they differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bundles import copied, replace_file, skip_bundle  # noqa: F401 - a fixture
from conftest import Run


@pytest.fixture
def bundle(skip_bundle: Path, tmp_path: Path) -> Path:  # noqa: F811
    return copied(skip_bundle, tmp_path / "bundle")


def opened(run: Run, bundle: Path) -> dict[str, Any]:
    done = run("probe_text_bundle", bundle)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_bundle_that_agrees(run: Run, bundle: Path) -> None:
    found = opened(run, bundle)
    assert {name: check["result"] for name, check in found.items()} == {"tokenizer": "good", "chat": "good"}
    assert found["tokenizer"]["seconds"] < 1


def change_checks(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    checks = json.loads((bundle / "text_checks.json").read_text())
    change(checks)
    replace_file(bundle, "text_checks.json", json.dumps(checks).encode())


def test_other_ids_or_texts_are_refused(run: Run, bundle: Path) -> None:
    change_checks(bundle, lambda checks: checks["strings"][7]["ids"].append(1))
    found = opened(run, bundle)
    assert "gets other ids, or another text, than the bundle's text_checks.json says" in found["tokenizer"]["result"]
    assert found["chat"]["result"] == "good"


def test_another_text_of_a_conversation_is_refused(run: Run, bundle: Path) -> None:
    change_checks(bundle, lambda checks: checks["chat"]["conversations"][3].update(text="no"))
    found = opened(run, bundle)
    assert "a conversation gets another text" in found["chat"]["result"]
    assert "render conversations yourself" in found["chat"]["result"]
    assert found["tokenizer"]["result"] == "good"


def test_a_template_that_is_not_covered_is_refused(run: Run, bundle: Path) -> None:
    change_checks(bundle, lambda checks: checks["chat"].update(covered=False, reason="the filter title"))
    assert "found the filter title; render conversations yourself" in opened(run, bundle)["chat"]["result"]


@pytest.mark.parametrize("content", [b"{}", b'{"version": 99, "strings": 5}'])
def test_without_checks_the_tokenizer_is_taken_and_no_template(run: Run, bundle: Path, content: bytes) -> None:
    replace_file(bundle, "text_checks.json", content)
    found = opened(run, bundle)
    assert found["tokenizer"]["result"] == "good"
    assert "found none; render conversations yourself" in found["chat"]["result"]


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"version": 1, "strings": [5]}',
        b'{"version": 1, "strings": [{"text": "a"}]}',
        b'{"version": 1, "strings": [{"text": "a", "ids": ["b"]}]}',
    ],
)
def test_damaged_checks_are_refused(run: Run, bundle: Path, content: bytes) -> None:
    replace_file(bundle, "text_checks.json", content)
    assert "text_checks.json: expected" in opened(run, bundle)["tokenizer"]["result"]
