"""Renders a chat template in a process of its own, which ``chat_template.py`` starts: a script without this package.

Templates come with models. Jinja's sandbox keeps them from this machine's objects; only the limits of a process keep
them from its time and memory.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

MEMORY = 1 << 30  # bytes of addresses, this process's own included
CHARACTERS = 16 << 20


def main() -> None:
    """Read a request as JSON from standard input, write the answer as JSON to standard output.

    The request has ``path`` (directories to import from), ``seconds`` (of processor time), ``template`` and
    ``variables``; the answer has ``text``, or ``error``, why there is none.
    """
    request = json.load(sys.stdin)
    sys.path += request["path"]
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        answer = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        answer = {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    except Exception as error:  # whatever a template comes to
        answer = {"error": (str(error) or type(error).__name__)[:2000]}
    json.dump(answer, sys.stdout)


def render(template: str, variables: dict[str, Any]) -> str:
    """Render as transformers' ``apply_chat_template`` does."""
    text: str = _environment().from_string(template).render(variables)
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes more than {CHARACTERS >> 20} Mi characters")
    return text


def used_variables(template: str) -> set[str]:
    """Names that the template reads and does not set itself."""
    from jinja2.meta import find_undeclared_variables

    return set(find_undeclared_variables(_environment().parse(template)))


def _environment() -> Any:
    """The environment that transformers gives to chat templates (utils/chat_template_utils.py)."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _guarded_namespace()
    return environment


def _generation_tag() -> type:
    """``{% generation %}`` marks the assistant's text for training; here its body is simply rendered."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja declares it so

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)

        def show(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


class _Dict:
    """Jinja's ``dict`` without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _guarded_namespace() -> Callable[..., Any]:
    """Jinja's namespace, whose assignments bypass the sandbox's checks, without underscored names."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def refuse_underscore(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")

    class GuardedNamespace(Namespace):
        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            attributes = dict(*args, **kwargs)
            for name in attributes:
                refuse_underscore(name)
            super().__init__(attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            refuse_underscore(name)
            super().__setitem__(name, value)

    return GuardedNamespace


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
