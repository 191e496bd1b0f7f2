"""C++ chat templates; the judge is Jinja, in the environment that the Python runtime uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.text.chat_template import ChatTemplate

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
USER, ANSWER = (
    {"role": "user", "content": " What's 6 times 7?\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\n42 "},
)
SYSTEM, AGAIN = {"role": "system", "content": "Be brief. /no_think"}, {"role": "user", "content": 'And "8 times 9"?'}
PARTS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " what is it? "}]}
ARGUMENTS = {"city": "Zürich", "days": 3, "exact": True, "when": None, "hot": 1.5, "tags": ["a", "<b>"]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}},
        {"id": "call00002", "type": "function", "function": {"name": "now", "arguments": {}}},
    ],
}
ONE_CALL = {**CALL, "tool_calls": CALL["tool_calls"][:1], "content": "I look."}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"temperature": 21}'}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather\nof a city, as 'text' & \"more\".",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {}},
            "required": ["city"],
        },
    },
}
CONVERSATIONS: list[list[Any]] = [
    [[USER], True, {}],
    [[USER], False, {}],
    [[SYSTEM, USER, ANSWER, AGAIN], True, {}],
    [[USER, ANSWER, AGAIN, ANSWER], False, {}],
    [[USER, USER], True, {}],
    [[ANSWER], True, {}],
    [[{**ANSWER, "reasoning_content": "so"}, AGAIN], True, {}],
    [[PARTS], True, {}],
    [[USER, ONE_CALL, RESULT, ANSWER, AGAIN], True, {"tools": [TOOL]}],
    [[SYSTEM, USER, CALL, RESULT, RESULT], True, {"tools": [TOOL, TOOL]}],
    [[SYSTEM, USER], True, {"tools": [TOOL], "tools_in_user_message": False}],
    [[USER, ONE_CALL, RESULT], True, {"builtin_tools": ["weather", "code_interpreter", "search"]}],
    [[USER], True, {"enable_thinking": False, "documents": [{"title": "t", "text": "x"}]}],
    [[{"role": "critic", "content": "no"}, USER], True, {}],
]

# Pieces of templates, one a line: each tries a feature of the language, with the variables below.
PIECES = (Path(__file__).parent / "templates" / "pieces.txt").read_text().splitlines()

# Jinja's, but not of the subset: refused in so many words.
REFUSED = (
    "{{ map.pop('a') }}",
    "{{ list.append(1) }}",
    "{{ 'a %s' % 'b' }}",
    "{{ 2 ** 3 }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% block x %}{% endblock %}",
    "{% raw %}{{ x }}{% endraw %}",
    "{% call m() %}{% endcall %}",
    "{% filter upper %}x{% endfilter %}",
    "{{ text.__class__ }}",
    "{{ text | safe }}",
    "{{ 'a'.format() }}",
    "{{ map.items }}",
    "{{ m(*list) }}",
    "{{ 99999999999999999999 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{% for x in list recursive %}{% endfor %}",
    "{{ {1: 2} }}",
    "{{ text | title }}",
    "{{ n.real }}",
)
VARIABLES = {
    "n": 3,
    "text": "häl👋lo",
    "list": [1, 2, 3],
    "map": {"a": 1, "b": {"c": [1, None, "é"]}, "z": "<&>'"},
    "people": [{"name": "Ada", "age": 36}, {"name": "Bob", "age": 0}, {"name": "Cyd", "age": 50, "more": {"x": 1}}],
}


def answers(run: Run, tasks: list[dict[str, Any]], timeout: float = 120) -> list[Any]:
    done = run("probe_chat", stdin=json.dumps(tasks).encode(), timeout=timeout)
    assert done.returncode == 0, done.stderr.decode()
    found: list[Any] = json.loads(done.stdout)
    return found


def rendered(template: ChatTemplate, conversation: list[Any]) -> Any:
    """Return Jinja's text, or its error."""
    messages, prompt, variables = conversation
    try:
        return template.render(messages, prompt, TOKENS, variables)
    except DynexportError as error:
        return {"error": str(error)}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_families(run: Run, name: str) -> None:
    template = ChatTemplate({"default": TEMPLATES[name]})
    task = {"template": TEMPLATES[name], "globals": TOKENS, "conversations": CONVERSATIONS}
    (found,) = answers(run, [task])
    wanted = [rendered(template, conversation) for conversation in CONVERSATIONS]
    assert sum(isinstance(text, str) for text in wanted) >= 4
    for conversation, ours, jinjas in zip(CONVERSATIONS, found, wanted, strict=True):
        if isinstance(jinjas, str):
            assert ours == jinjas, conversation
        else:
            assert "error" in ours, (conversation, jinjas)


def test_pieces_of_templates(run: Run) -> None:
    conversation = [[USER, ANSWER], True, VARIABLES]
    tasks = [{"template": text, "globals": TOKENS, "conversations": [conversation]} for text in PIECES]
    wrong = []
    for text, found in zip(PIECES, answers(run, tasks), strict=True):
        ours = found[0] if isinstance(found, list) else found
        jinjas = rendered(ChatTemplate({"default": text}), conversation)
        same = ours == jinjas if isinstance(jinjas, str) else isinstance(ours, dict)
        if not same:
            wrong.append((text, ours, jinjas))
    assert not wrong


def test_white_space(run: Run) -> None:
    """Every place where a tag, a sign, spaces and line ends may meet."""
    tags = [f"{{%{a} if 1 {b}%}}" for a in ("", "-", "+") for b in ("", "-", "+")]
    tags += [f"{{{{{a} 'v' {b}}}}}" for a in ("", "-") for b in ("", "-")]
    tags += [f"{{#{a} c {b}#}}" for a in ("", "-", "+") for b in ("", "-", "+")]
    gaps = ("", " ", "\n", " \n ", "\n\n", "x", "x \n  ", "\u00a0\n\x1f")
    templates = []
    for tag in tags:
        end = "{% endif %}" if "if" in tag else ""
        templates += [f"{before}{tag}{after}y{after}{end}{before}\n" for before in gaps for after in gaps]
    conversation = [[USER], True, {}]
    tasks = [{"template": text, "globals": {}, "conversations": [conversation]} for text in templates]
    from dynexport.runtime.text.template_process import _environment

    environment = _environment()
    for text, (found,) in zip(templates, answers(run, tasks), strict=True):
        assert found == environment.from_string(text).render(), text


def test_what_is_not_known_is_refused(run: Run) -> None:
    conversation = [[USER], True, VARIABLES]
    tasks = [{"template": text, "globals": {}, "conversations": [conversation]} for text in REFUSED]
    for text, found in zip(REFUSED, answers(run, tasks), strict=True):
        error = (found[0] if isinstance(found, list) else found)["error"]
        assert "is not known to this runtime; render conversations yourself" in error, (text, error)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {},
        ["x"],
        [{"content": "a"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
    ],
)
def test_messages_are_checked(run: Run, messages: Any) -> None:
    wanted = rendered(ChatTemplate({"default": "x"}), [messages, True, {}])
    (found,) = answers(run, [{"template": "x", "globals": {}, "conversations": [[messages, True, {}]]}])
    assert found[0]["error"].split(":")[0] == wanted["error"].split(":")[0]


def test_hostile_templates_end(run: Run) -> None:
    templates = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for a in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}",
        "{% set ns = namespace(x=[]) %}{% for a in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ 1" + " + 1" * 50000 + " }}",
        "{{ " + "not " * 50000 + "1 }}",
        "{{ a" + ".a" * 50000 + " }}",
        "{% if 1 %}" * 20000,
        "{{ 'x' * 99999999999 }}",
        "{{ [1] * 99999999999 }}",
        "{{ '{}'.replace('', 'x' * 99999).replace('', 'x' * 99999) }}",
        "{{ 1 | tojson(indent=99999999) }}",
    )
    tasks = [{"template": text, "globals": {}, "conversations": [[[USER], True, {}]]} for text in templates]
    for text, found in zip(templates, answers(run, tasks, timeout=60), strict=True):
        assert "error" in (found[0] if isinstance(found, list) else found), text[:80]
