"""Chat templates: choose one of a model's templates and render messages with it, as transformers does."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dynexport.runtime.bundle.checks import checked_kind, checked_list
from dynexport.runtime.bundle.errors import DynexportError, told_as
from dynexport.runtime.bundle.text_files import CONFIG_FILE, TEMPLATE_FILE
from dynexport.runtime.text import template_process
from dynexport.runtime.text.render_process import RenderError, RenderProcess

_LARGEST_TEMPLATE = 1 << 20  # characters
SECONDS = 10  # of CPU time; an ordinary template takes a thousandth of it
# Names of a message's reasoning field; most templates read the first, gpt-oss's reads the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OUR_VARIABLES = ("messages", "add_generation_prompt")
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """The chat templates of a model, rendered in a sandbox, in processes with limited time and memory.

    One process starts at the first use, compiles them, and ends with this object; a fork of it renders each text.
    Several threads may share it.

    Args:
        templates: template text by name; "tool_use" is used when tools are given and it exists, else "default".

    Raises:
        DynexportError: for a template that is too long.
    """

    def __init__(self, templates: Mapping[str, str]) -> None:
        for name, template in templates.items():
            if len(template) > _LARGEST_TEMPLATE:
                raise DynexportError(
                    f"{TEMPLATE_FILE}: template {name:.80}: expected at most {_LARGEST_TEMPLATE} characters, found "
                    f"{len(template)}"
                )
        self._templates, self._process = dict(templates), RenderProcess(templates, SECONDS)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        special_tokens: Mapping[str, str],
        variables: Mapping[str, Any],
    ) -> str:
        """Return the text of a conversation.

        Args:
            messages: one or more messages, as JSON values; each has a role, and text or a list of parts as content.
            add_generation_prompt: whether to end with the tokens that open the assistant's turn.
            special_tokens: the tokenizer's special tokens, by their names in a template.
            variables: further template variables, as JSON values; they override special tokens of the same name.
                ``tools`` and ``documents`` are lists.

        Raises:
            DynexportError: when messages or variables have the wrong type, or the template fails, raises an error, or
                exceeds its time or memory.
        """
        checked_kind("variables", variables, Mapping, "values by name")
        for name in _OUR_VARIABLES:
            if name in variables:
                raise DynexportError(f"template variable {name}: expected another name; dynexport sets this one itself")
        values = {
            "tools": None,
            "documents": None,
            **special_tokens,
            **_json_values("template variables", dict(variables)),
            "messages": _plain_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._rendered(self._chosen(values["tools"] is not None), values)

    def unused(self, variables: Collection[str]) -> list[str]:
        """Return the names of variables that no template reads. Raises DynexportError for an invalid template."""
        with told_as(f"{TEMPLATE_FILE}: the chat template is damaged"):
            read = set().union(*map(template_process.used_variables, self._templates.values()))
        return [name for name in variables if name not in {*read, "tools"}]

    def _rendered(self, template: str, values: dict[str, Any]) -> str:
        try:
            return self._process.render(template, values)
        except RenderError as error:
            raise DynexportError(f"{TEMPLATE_FILE}: the chat template failed: {error!s:.500}") from error
        except OSError as error:
            raise DynexportError(f"{TEMPLATE_FILE}: the chat template's process failed: {error}") from error

    def _chosen(self, with_tools: bool) -> str:
        """Return the name of the template to use."""
        if with_tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            raise DynexportError(
                f"{TEMPLATE_FILE}: expected a template named default, found {sorted(self._templates)!s:.200}; put the "
                "one to use into the checkpoint's chat_template.jinja, and convert again"
            )
        return "default"


def named_templates(value: Any, where: str) -> dict[str, str]:
    """Return the templates of the field ``chat_template`` of a tokenizer_config.json, text by name.

    Args:
        value: the field: text; a list of objects with "name" and "template"; texts by name; or None.
        where: the file, for errors.

    Raises:
        DynexportError: when the field is of another type.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(text, str) for entry in value.items() for text in entry):
        return dict(value)
    raise DynexportError(f"{where}: chat_template: expected text, or texts by name, found {type(value).__name__}")


def _plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of messages as JSON values without nulls, as transformers passes them to a template."""
    listed = checked_list("messages", messages, "messages")
    if not listed:
        raise DynexportError("messages: expected at least one, found none")
    conversation = []
    for index, message in enumerate(listed):
        where = f"messages[{index}]"
        checked_kind(where, message, Mapping, 'a mapping with "role" and "content"')
        if not isinstance(message.get("role"), str):
            raise DynexportError(f'{where}: expected text under "role"')
        content = message.get("content")
        if not (isinstance(content, str | list) or (content is None and "tool_calls" in message)):
            raise DynexportError(f'{where}: expected text, or a list of parts, under "content"')
        fields = {name: value for name, value in _json_values(where, dict(message)).items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        conversation.append(fields)
    return conversation


def _json_values(where: str, fields: dict[str, Any]) -> dict[str, Any]:
    with told_as(f"{where}: expected JSON values"):
        copy: dict[str, Any] = json.loads(json.dumps(fields))
    return copy


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of a tokenizer_config.json, each given as text or as an object with "content"."""
    tokens = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            tokens[name] = token
        elif value is not None:
            raise DynexportError(f'{CONFIG_FILE}: {name}: expected text or an object with "content", found {value!r}')
    return tokens
