"""Makes ``text_checks.json``: texts with their ids, conversations with their texts, for runtimes of all languages."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from dynexport.exporter.bundle.check_strings import check_strings
from dynexport.exporter.bundle.template_subset import beyond_subset
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.text_files import CHECKS_FILE, CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from dynexport.runtime.text.chat_template import ChatTemplate, named_templates, special_tokens
from dynexport.runtime.text.template_process import parsed
from dynexport.runtime.text.text import Text

VERSION = 1
_LARGEST = 1 << 20  # bytes of all strings, and of all conversations
_ASK = {"role": "user", "content": "What's 6 * 7?\n"}
_ANSWER = {"role": "assistant", "content": '<think>\nEasy.\n</think>\n\n 42, "of course" '}
_SYSTEM = {"role": "system", "content": " Be brief. 你好 "}
_AGAIN = {"role": "user", "content": "And 7 * 8?"}
_ARGUMENTS = {"city": "Zürich", "days": 3, "exact": True, "when": None, "share": 0.5, "tags": ["a", "<b>"]}
_CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": _ARGUMENTS}}
_CALLS = {"role": "assistant", "content": "I look.", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"temperature": 21}'}
_PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "its 'name' & \"more\""}, "days": {"type": "integer"}},
    "required": ["city"],
}
_TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather\nof a city.", "parameters": _PARAMETERS},
}
_PARTS = {"role": "user", "content": [{"type": "text", "text": " Hello "}, {"type": "text", "text": "there"}]}
# Messages, whether the assistant's turn is opened, and more variables.
CONVERSATIONS: tuple[tuple[list[dict[str, Any]], bool, dict[str, Any]], ...] = (
    ([_ASK], True, {}),
    ([_ASK], False, {}),
    ([_SYSTEM, _ASK], True, {}),
    ([_ASK, _ANSWER, _AGAIN], True, {}),
    ([_SYSTEM, _ASK, _ANSWER, _AGAIN, _ANSWER], False, {}),
    ([_ASK, {**_ANSWER, "reasoning_content": "So."}, _AGAIN], True, {}),
    ([_PARTS], True, {}),
    ([_ASK], True, {"tools": [_TOOL]}),
    ([_SYSTEM, _ASK, _CALLS, _RESULT], True, {"tools": [_TOOL, _TOOL]}),
    ([_ASK, _CALLS, _RESULT, _ANSWER, _AGAIN], True, {}),
    ([_ASK], True, {"enable_thinking": False}),
    ([_ASK, _ANSWER, _AGAIN], True, {"date_string": "26 Jul 2024"}),
)
_NO_DATE = "{% macro strftime_now(format) %}a day{% endmacro %}"


def text_checks(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the file by which runtimes check themselves, by its name; nothing without a tokenizer and a template.

    Args:
        files: the text files of a bundle, by name.
    """
    checks: dict[str, Any] = {}
    if TOKENIZER_FILE in files:
        checks["strings"] = list(_strings(Text.from_files(files), files))
    if TEMPLATE_FILE in files:
        checks["chat"] = _chat(files)
    if not checks:
        return {}
    versions = {name: metadata.version(name) for name in ("jinja2", "tokenizers")}
    content = {"version": VERSION, "made_with": versions, **checks}
    return {CHECKS_FILE: json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()}


def _strings(text: Text, files: Mapping[str, bytes]) -> Iterator[dict[str, Any]]:
    """Yield each text with its ids, and their text where it is another; without texts that have no ids."""
    added = json.loads(files[TOKENIZER_FILE]).get("added_tokens") or ()
    size = 0
    for string in check_strings([token["content"] for token in added]):
        try:
            ids = text.encode(string)
            decoded = text.decode(ids)
        except DynexportError:  # a vocabulary without a token for what is unknown
            continue
        size += 8 * len(ids) + len(string) + len(decoded)
        if size > _LARGEST:
            return
        yield {"text": string, "ids": ids} | ({} if decoded == string else {"decoded": decoded})


def _chat(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return whether the chat template is of the subset, else why not, and conversations with their texts."""
    config = parse_json_object(files.get(CONFIG_FILE, b"{}"), CONFIG_FILE)
    try:
        template = files[TEMPLATE_FILE].decode()
        reason = beyond_subset(parsed(template))
    except Exception as error:  # a damaged template: rendering says more
        return {"covered": False, "reason": f"it cannot be parsed: {error!s:.200}", "conversations": []}
    if named_templates(config.get("chat_template"), CONFIG_FILE).keys() - {"default"}:
        reason = "there are several templates"
    conversations = [] if reason else list(_conversations(template, special_tokens(config)))
    if not reason and not conversations:
        reason = "it renders no conversation that a check can use"
    return {"covered": not reason, "reason": reason or "", "conversations": conversations}


def _conversations(template: str, tokens: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the conversations that the template renders, with their texts; without those that contain the date."""
    dated = "strftime_now" in template
    chat = ChatTemplate({"default": template})
    undated = ChatTemplate({"default": _NO_DATE + template})
    size = 0
    for messages, prompt, variables in CONVERSATIONS:
        try:
            text = chat.render(messages, prompt, tokens, variables)
            if dated and text != undated.render(messages, prompt, tokens, variables):
                continue
        except DynexportError as error:
            if "it takes more than" in str(error):
                return
            continue
        size += len(text)
        if size > _LARGEST:
            return
        yield {"messages": messages, "add_generation_prompt": prompt, "variables": variables, "text": text}


__all__ = ["CONVERSATIONS", "VERSION", "text_checks"]
