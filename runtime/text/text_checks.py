"""Checks this runtime's tokenizer and chat template by the bundle's ``text_checks.json``."""

from __future__ import annotations

from typing import Any

from tokenizers import __version__ as tokenizers_version

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError, told_as
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.text_files import CHECKS_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from dynexport.runtime.text.text import Text

_VERSION = 1


def check_text(bundle: Bundle) -> None:
    """Check that texts get the ids, and conversations the texts, that they had when the bundle was made.

    A bundle without the file, or with one of another version, is not checked.

    Raises:
        DynexportError: for a difference, or a file that is damaged.
    """
    if CHECKS_FILE not in bundle.manifest.files:
        return
    checks = parse_json_object(bundle.read(CHECKS_FILE), CHECKS_FILE)
    if checks.get("version") != _VERSION:
        return
    text = Text.of_bundle(bundle)
    with told_as(f"{bundle.path}: {CHECKS_FILE}: expected strings and conversations"):
        made_with = str(checks["made_with"]["tokenizers"])
        for string in checks.get("strings", ()):
            _check_string(text, string, made_with)
        for conversation in (checks.get("chat") or {}).get("conversations", ()):
            _check_conversation(text, conversation)


def _check_string(text: Text, string: dict[str, Any], made_with: str) -> None:
    ids = text.encode(string["text"])
    decoded = text.decode(string["ids"])
    for found, expected in ((ids, string["ids"]), (decoded, string.get("decoded", string["text"]))):
        if found != expected:
            raise DynexportError(
                f"{TOKENIZER_FILE}: {string['text']!r:.60}: expected {expected!r:.60} as with tokenizers {made_with}, "
                f"found {found!r:.60} with {tokenizers_version}; install that version, or convert again"
            )


def _check_conversation(text: Text, conversation: dict[str, Any]) -> None:
    found = text.render(conversation["messages"], conversation["add_generation_prompt"], conversation["variables"])
    if found != conversation["text"]:
        raise DynexportError(
            f"{TEMPLATE_FILE}: a conversation of the bundle's checks: expected {conversation['text']!r:.80}, found "
            f"{found!r:.80}; install the jinja2 that the bundle was made with, or convert again"
        )


__all__ = ["check_text"]
