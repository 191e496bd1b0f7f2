"""Render chat templates in a process of their own: a script, run by ``render_process.py``, without dynexport imports.

Templates come with models and are untrusted. Jinja's sandbox limits the objects that they reach; only process limits
bound their time and memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

MEMORY = 1 << 30  # bytes of address space of each process
CHARACTERS = 16 << 20
WAIT = 10  # how many times the CPU time a render may take altogether


def main() -> None:
    """Compile templates, then render each request in a fork, until the caller closes its end of the control socket.

    A fork has the compiled templates, but nothing of another request, and its limits are its own.

    Standard input is a JSON object: ``path`` (directories to import from), ``seconds`` (of CPU time, for compiling and
    for each render) and ``templates`` (text by name). The argument is the file descriptor of the control socket. Each
    byte on it brings a socket, on which a request and its answer go as JSON objects to their ends: ``template`` (a
    name) and ``variables``; ``text``, or ``error`` with the reason.
    """
    setup = json.load(sys.stdin)
    sys.path += setup["path"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the caller, too
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no fork becomes a zombie
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    seconds, (_, most) = setup["seconds"], resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    templates = {name: _compiled(text) for name, text in setup["templates"].items()}
    resource.setrlimit(resource.RLIMIT_CPU, (most, most))
    with socket.socket(fileno=int(sys.argv[1])) as control:
        while True:
            byte, files, _, _ = socket.recv_fds(control, 1, 1)
            if not byte:
                return
            for file in files:
                if not os.fork():
                    control.close()
                    _answer(socket.socket(fileno=file), templates, seconds)
                os.close(file)


def _answer(connection: socket.socket, templates: Mapping[str, Any], seconds: int) -> None:
    """Answer one request and end the process."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        signal.alarm(WAIT * seconds)
        with connection.makefile("rwb") as stream:
            request = json.load(stream)
            stream.write(json.dumps(_rendered(templates[request["template"]], request["variables"])).encode())
    finally:
        os._exit(0)


def _compiled(template: str) -> Any:
    """Return a compiled template, or the answer to every request for it if it cannot be compiled."""
    try:
        return _environment().from_string(template)
    except Exception as error:  # compiling evaluates constant expressions, which may raise anything
        return _failed(error)


def _rendered(template: Any, variables: dict[str, Any]) -> dict[str, str]:
    """Return the answer with the rendered text, as transformers' ``apply_chat_template`` renders it."""
    if isinstance(template, dict):
        return template
    try:
        text: str = template.render(variables)
    except Exception as error:  # a template may raise anything
        return _failed(error)
    if len(text) > CHARACTERS:
        return {"error": f"it makes more than {CHARACTERS >> 20} Mi characters"}
    return {"text": text}


def _failed(error: Exception) -> dict[str, str]:
    if isinstance(error, MemoryError):
        return {"error": f"it takes more than {MEMORY >> 20} MiB of memory"}
    return {"error": (str(error) or type(error).__name__)[:2000]}


def parsed(template: str) -> Any:
    """Return the syntax tree of a template. Raises jinja2's errors for one that is invalid."""
    return _environment().parse(template)


def used_variables(template: str) -> set[str]:
    """Return the names of variables that a template reads and does not set."""
    from jinja2.meta import find_undeclared_variables

    return set(find_undeclared_variables(parsed(template)))


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
