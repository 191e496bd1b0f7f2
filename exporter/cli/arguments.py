"""Arguments that several commands share, and parsers of their values."""

from __future__ import annotations

import codecs
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json
from dynexport.runtime.bundle.machine import available_cores
from dynexport.runtime.bundle.plain_files import open_named
from dynexport.runtime.engines.registry import RUN_BACKENDS, WEIGHTS

_Command = TypeVar("_Command", bound=Callable[..., Any])
_LARGEST_FROM_PIPE = 64 << 20  # bytes

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
threads_option = click.option(
    "--threads", type=int, default=available_cores, show_default="all cores", help="Threads of ONNX Runtime."
)
backend_option = click.option(
    "--backend",
    type=click.Choice(RUN_BACKENDS),
    default="onnxruntime",
    show_default=True,
    help="What runs the graphs; tensorrt and tensorrt-rtx run the engines of `dynexport build` on a GPU.",
)
weights_option = click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="packed",
    show_default=True,
    help="packed: rearranged at load for the fastest steps; mapped: used as they lie in the file, so that they load in "
    "no time and processes share them, with slower steps; fp32 on the CPU.",
)
trust_option = click.option(
    "--trust-engines",
    is_flag=True,
    help="Load TensorRT engines that were built elsewhere. An engine is native code: load only those that you trust.",
)
text_option = click.option(
    "--text",
    "text_path",
    required=True,
    type=click.Path(path_type=Path),
    help="UTF-8 text: a file, a pipe, or '-' for standard input.",
)
# Where the value of --loops waits for --depth.
_LOOPS = "dynexport.loops"


def options(*decorators: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    """Return a decorator that adds several options to a command, in this order."""

    def add(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def depth_option(text: str) -> Callable[[_Command], _Command]:
    """Return the option that chooses a depth: a ratio, a kept set's name or "full".

    Args:
        text: help text of the option.
    """
    return options(
        click.option("--speedup", "--depth", "depth", callback=_or_loops, help=text),
        click.option(
            "--loops",
            type=click.IntRange(min=1),
            is_eager=True,
            expose_value=False,
            callback=lambda context, _, value: context.meta.update({_LOOPS: value}),
            help="Of a looped model, run the first LOOPS loops only: --depth loops-LOOPS.",
        ),
    )


def _or_loops(context: click.Context, _: click.Parameter, depth: str | None) -> str | None:
    """Return the depth that --depth or --loops asks for."""
    loops = context.meta[_LOOPS]
    if loops is not None and depth is not None:
        raise click.UsageError(f"--loops: expected without --depth, found {loops} beside {depth:.40}")
    return depth if loops is None else f"loops-{loops}"


def numbers(text: str, option: str) -> list[int]:
    """Return the whole numbers of a comma-separated text; an empty list for an empty text.

    Raises:
        click.BadParameter: a part is not a whole number; the message names ``option``.
    """
    try:
        return [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise click.BadParameter(
            f"expected whole numbers separated by commas, found {text!r:.80}", param_hint=option
        ) from error


def settings(options: Iterable[str], option: str) -> dict[str, Any]:
    """Return the fields of ``NAME=VALUE`` texts; a.b=1 sets a field of an object, and a value is JSON or else text.

    Raises:
        click.BadParameter: a name or "=" is missing, or a field is set twice; the message names ``option``.
    """
    fields: dict[str, Any] = {}
    for text in options:
        name, equals, value = text.partition("=")
        path = name.split(".")
        if not equals or not all(path):
            raise click.BadParameter(f"expected FIELD=VALUE, found {text!r:.80}", param_hint=option)
        setting = _json_or_text(value)
        for part in reversed(path):
            setting = {part: setting}
        if not _add(fields, setting):
            raise click.BadParameter(f"expected {name:.80} once, found it set twice", param_hint=option)
    return fields


def _json_or_text(value: str) -> Any:
    try:
        return parse_json(value, "a value")
    except DynexportError:
        return value


def _add(fields: dict[str, Any], more: dict[str, Any]) -> bool:
    """Merge ``more`` into ``fields``, nested objects too; return False if a field has a value already."""
    for name, value in more.items():
        if name not in fields:
            fields[name] = value
        elif not (isinstance(fields[name], dict) and isinstance(value, dict) and _add(fields[name], value)):
            return False
    return True


def read_text(path: Path, max_tokens: int) -> str:
    """Return the beginning of a text, 16 bytes for each of ``max_tokens`` tokens; "-" is standard input.

    Raises:
        DynexportError: the text cannot be read, or is not UTF-8.
    """
    limit = 16 * max(1, max_tokens)
    path = Path("/dev/stdin") if str(path) == "-" else path
    try:
        with open_named(path, "a text file") as file:
            status = os.fstat(file.fileno())
            limit = min(limit, status.st_size + 1 if stat.S_ISREG(status.st_mode) else _LARGEST_FROM_PIPE)
            content = file.read(limit)
        # The cut may split a character; the end of the file must not.
        return codecs.getincrementaldecoder("utf-8")().decode(content, final=len(content) < limit)
    except OSError as error:
        raise DynexportError(f"{path}: expected a text file, found: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DynexportError(f"{path}: expected UTF-8 text, found {error.reason} at byte {error.start}") from error
