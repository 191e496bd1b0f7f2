"""The strings and conversations that a bundle ships, by which runtimes check themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bundles import CHAT, dynexport, replace_file
from tokenizers import Tokenizer, models

from dynexport.exporter.bundle.check_strings import PHRASES
from dynexport.exporter.bundle.template_subset import FILTERS, FUNCTIONS, LOOP, METHODS, TESTS, beyond_subset
from dynexport.exporter.bundle.text_checks import text_checks
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.template_process import parsed
from dynexport.runtime.text.text_checks import check_text

DOCS = Path(__file__).parents[2] / "docs"


def checks_of(template: str, **config: Any) -> dict[str, Any]:
    files = {"chat_template.jinja": template.encode(), "tokenizer_config.json": json.dumps(config).encode()}
    found: dict[str, Any] = json.loads(text_checks(files)["text_checks.json"])["chat"]
    return found


def test_what_a_bundle_ships(bundle: Path) -> None:
    checks = json.loads((bundle / "text_checks.json").read_text())
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    texts = [string["text"] for string in checks["strings"]]
    assert len(texts) > 300 and set(PHRASES) <= set(texts)
    assert any("<|im_start|>" in text for text in texts)
    for string in checks["strings"]:
        assert string["ids"] == tokenizer.encode(string["text"]).ids
        assert string.get("decoded", string["text"]) == tokenizer.decode(string["ids"])
    assert checks["chat"]["covered"] and len(checks["chat"]["conversations"]) > 8
    assert "text_checks.json" in Bundle.open(bundle).manifest.files


def test_the_same_files_give_the_same_checks(bundle: Path) -> None:
    files = {name: (bundle / name).read_bytes() for name in ("tokenizer.json", "chat_template.jinja")}
    assert text_checks(files) == text_checks(files)
    assert text_checks({"generation_config.json": b"{}"}) == {}


def test_a_runtime_with_another_tokenizer_is_found(bundle: Path) -> None:
    check_text(Bundle.open(bundle))
    other = Tokenizer(models.BPE({"a": 0}, []))
    replace_file(bundle, "tokenizer.json", other.to_str().encode())
    with pytest.raises(DynexportError, match=r"tokenizer\.json: .*: expected .* as with tokenizers .*, found"):
        check_text(Bundle.open(bundle))
    assert dynexport("inspect", bundle).code == 0
    ran = dynexport("inspect", bundle, "--check")
    assert ran.code == 2 and "convert again" in ran.err


def test_a_runtime_with_another_jinja_is_found(bundle: Path) -> None:
    replace_file(bundle, "chat_template.jinja", CHAT.replace(":", "-").encode())
    with pytest.raises(DynexportError, match=r"chat_template\.jinja: a conversation of the bundle's checks"):
        check_text(Bundle.open(bundle))


@pytest.mark.parametrize("content", [b"{}", b'{"version": 2}'])
def test_bundles_without_checks_are_taken(bundle: Path, content: bytes) -> None:
    replace_file(bundle, "text_checks.json", content)
    check_text(Bundle.open(bundle))


@pytest.mark.parametrize(
    "content", [b"[]", b'{"version": 1}', b'{"version": 1, "made_with": {"tokenizers": "1"}, "strings": [1]}']
)
def test_damaged_checks_are_refused(bundle: Path, content: bytes) -> None:
    replace_file(bundle, "text_checks.json", content)
    with pytest.raises(DynexportError, match=r"text_checks\.json: expected"):
        check_text(Bundle.open(bundle))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages | title }}", "the filter title"),
        ("{{ messages is callable }}", "the test callable"),
        ("{{ 'a'.format() }}", "the method format"),
        ("{{ messages[0].pop }}", "the attribute pop"),
        ("{% include 'x' %}", "the node Include"),
        ("{{ 2 ** 3 }}", "the node Pow"),
        ("{% for m in messages recursive %}{% endfor %}", "a recursive loop"),
        ("{% filter upper %}{% endfilter %}", "the node FilterBlock"),
        ("{% call m() %}{% endcall %}", "a call block"),
        ("{{ loop.changed(1) }}", "the method changed"),
        ("{{ cycler('a') }}", "the name cycler"),
        ("{{ range(*messages) }}", "an argument with *"),
        ("{% if %}", "it cannot be parsed"),
        ("{{ raise_exception('no') }}", "it renders no conversation"),
    ],
)
def test_templates_beyond_the_subset(template: str, reason: str) -> None:
    checks = checks_of(template)
    assert not checks["covered"] and checks["reason"].startswith(reason), checks
    assert checks["conversations"] == []


def test_several_templates_are_not_covered() -> None:
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    assert checks_of("x", chat_template=named)["reason"] == "there are several templates"


def test_texts_with_the_date_are_left_out() -> None:
    fixed = "{% if tools %}{{ strftime_now('%Y') }}{% endif %}{{ messages[0].content }}"
    with_date = [conversation["variables"] for conversation in checks_of(fixed)["conversations"]]
    assert {} in with_date and not any("tools" in variables for variables in with_date)
    assert "it renders no conversation" in checks_of("{{ strftime_now('%Y') }}")["reason"]


@pytest.mark.parametrize("names", [FILTERS, FUNCTIONS, LOOP, METHODS, TESTS])
def test_the_documentation_lists_the_subset(names: frozenset[str]) -> None:
    written = (DOCS / "bundle.md").read_text()
    assert [name for name in sorted(names) if f"`{name}`" not in written] == []


def test_conversations_have_what_templates_read() -> None:
    assert beyond_subset(parsed(CHAT)) is None
    texts = [conversation["text"] for conversation in checks_of(CHAT)["conversations"]]
    assert any("7 * 8" in text for text in texts)
