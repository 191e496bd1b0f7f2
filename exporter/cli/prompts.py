"""Reading of prompts from an option, a file or standard input, as UTF-8."""

from __future__ import annotations

import stat
import sys
from collections.abc import Generator
from os import fstat
from pathlib import Path
from typing import BinaryIO, TypeVar

import click

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import open_named

# Bytes; no context holds more text.
_LARGEST = 64 << 20
_Given = TypeVar("_Given", str | None, tuple[str, ...])


def utf8(ctx: click.Context, param: click.Parameter, value: _Given) -> _Given:
    """Return an option's text after a check that it is UTF-8; Python keeps other bytes as surrogates.

    Raises:
        click.BadParameter: the text is not UTF-8.
    """
    for text in value if isinstance(value, tuple) else (value or "",):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) & 0xFF
            found = f"found the byte 0x{byte:02x} after {error.start} characters"
            raise click.BadParameter(f"expected UTF-8, {found}", ctx, param) from error
    return value


def given_prompt(prompt: str | None, path: Path | None, *, from_pipe: bool) -> str | None:
    """Return the prompt of ``--prompt`` or ``--prompt-file``; "-" is standard input.

    Args:
        prompt: value of ``--prompt``.
        path: value of ``--prompt-file``.
        from_pipe: whether to read a pipe or file on standard input if both options are missing.

    Returns:
        The text, without the last line break of a file; None without a prompt.

    Raises:
        DynexportError: the text cannot be read, is not UTF-8, or is larger than 64 MiB.
    """
    if path is not None and str(path) != "-":
        where = f"--prompt-file {path}"
        with open_named(path, "a text file for --prompt-file", advice="name one, or give it on standard input") as file:
            return _read(file, where)
    if path is not None or prompt == "-" or (prompt is None and from_pipe and _is_piped()):
        return _read(sys.stdin.buffer, "standard input")
    return prompt


def piped_lines() -> Generator[str, None, None]:
    """Yield the lines of standard input without line breaks. Raises DynexportError if one is not UTF-8."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        yield _decoded(line, f"standard input: line {number}").rstrip("\r\n")


def _read(file: BinaryIO, where: str) -> str:
    try:
        content = file.read(_LARGEST + 1)
    except OSError as error:
        raise DynexportError(f"{where}: expected text, found: {error.strerror}") from error
    if len(content) > _LARGEST:
        raise DynexportError(f"{where}: expected at most {_LARGEST >> 20} MiB of text, found more")
    return _decoded(content, where).removesuffix("\n").removesuffix("\r")


def _decoded(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"0x{content[error.start]:02x} at byte {error.start}"
        raise DynexportError(f"{where}: expected UTF-8 text, found {byte}; save or convert it as UTF-8") from error


def _is_piped() -> bool:
    """Return whether standard input is a pipe or a file, not a terminal or /dev/null."""
    try:
        mode = fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
