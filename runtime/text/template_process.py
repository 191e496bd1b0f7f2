"""Render a chat template in a separate process: a script, run by ``chat_template.py``, without dynexport imports.

Templates come with models and are untrusted. Jinja's sandbox limits the objects that they reach; only process limits
bound their time and memory.
"""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Any

MEMORY = 1 << 30  # bytes of address space of the whole process
CHARACTERS = 16 << 20
# The process ends after a render that took more, so that the next one finds the memory free; bytes.
_KEPT = 256 << 20


def main() -> None:
    """Answer requests, one JSON object a line, from standard input to standard output, until the input ends.

    The arguments are directories to import from. A request has ``seconds`` (CPU time), ``template`` and ``variables``.
    An answer has ``text``, or ``error`` with the reason; and ``last`` if the process ends after it.
    """
    sys.path += sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the caller, too
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        answer = _answer(line)
        del line
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if peak > _KEPT:
            answer["last"] = True
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        if peak > _KEPT:
            return


def _answer(line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        _limit(request["seconds"])
        return {"text": render(request["template"], request["variables"])}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory", "last": True}
    except Exception as error:  # a template may raise anything
        return {"error": (str(error) or type(error).__name__)[:2000]}


def _limit(seconds: int) -> None:
    """Allow so many more seconds of CPU time; the system kills the process after them."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(used.ru_utime + used.ru_stime + seconds), hard))


def render(template: str, variables: dict[str, Any]) -> str:
    """Return the rendered text, as transformers' ``apply_chat_template`` does."""
    text: str = _compiled(template).render(variables)
    if len(text) > CHARACTERS:
        raise ValueError(f"it makes more than {CHARACTERS >> 20} Mi characters")
    return text


@lru_cache(maxsize=4)
def _compiled(template: str) -> Any:
    """Return a compiled template. It keeps nothing of a render: each has a context and macros of its own."""
    return _environment().from_string(template)


def used_variables(template: str) -> set[str]:
    """Return the names of variables that a template reads and does not set."""
    from jinja2.meta import find_undeclared_variables

    return set(find_undeclared_variables(_environment().parse(template)))


def _environment() -> Any:
    """Return the Jinja environment that transformers uses for chat templates (utils/chat_template_utils.py)."""
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
    """Return the extension for ``{% generation %}``, which marks training text; it only renders its body."""
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
    """A replacement for Jinja's global ``dict`` that does not expose the Python type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _guarded_namespace() -> Callable[..., Any]:
    """Return Jinja's namespace, but with underscored names refused: its assignments bypass the sandbox."""
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
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
