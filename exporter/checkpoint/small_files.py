"""The small files beside the weights: found by their names, parsed with errors that name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynexport.runtime.errors import DynexportError


def find_file(directory: Path, name: str) -> Path | None:
    """A file of a directory, or None when there is none of that name.

    Links are followed wherever they lead, as people keep large files elsewhere and hub caches consist of links.

    Args:
        directory: of the checkpoint.
        name: a plain file name.

    Raises:
        DynexportError: when it cannot be looked up.
    """
    path = directory / name
    try:
        return path if path.is_file() else None
    except OSError as error:
        raise DynexportError(f"{directory}: {name:.80}: cannot be looked up ({error.strerror})") from error


def read_file(path: Path) -> bytes:
    """All of a file. Raises DynexportError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object.

    Args:
        content: the JSON text, UTF-8.
        path: the file it is from, for messages.

    Raises:
        DynexportError: when it is not JSON, or not an object.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DynexportError(
            f"{path}: expected JSON, found something else ({error}); restore it from where the model is from"
        ) from error
    if not isinstance(value, dict):
        raise DynexportError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
