"""The lookup and parsing of the small files beside the weights; errors name the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.plain_files import open_plain, read_plain

# The advice of an error about a tokenizer.
ANOTHER_TOKENIZER = "name a tokenizer.json with --tokenizer"


def find_file(directory: Path, name: str) -> Path | None:
    """Return the path of a file in a directory, or None if there is no such file.

    Links are followed to any place, because hub caches consist of links and large files are often kept elsewhere.

    Args:
        directory: the checkpoint's directory.
        name: a plain file name.

    Raises:
        DynexportError: when it cannot be looked up, or is not a file.
    """
    path = directory / name
    try:
        if path.is_file():
            return path
        if path.is_symlink() or path.exists():
            open_plain(path).close()  # says what is in its place
        return None
    except OSError as error:
        raise DynexportError(f"{directory}: {name:.80}: cannot be looked up ({error.strerror})") from error


def read_file(path: Path) -> bytes:
    """Return the content of a file. Raises DynexportError when it cannot be read."""
    return read_plain(path)


def parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in a file's content.

    Args:
        content: the JSON text, UTF-8.
        path: the file, for messages.

    Raises:
        DynexportError: when it is not JSON, or not an object.
    """
    return parse_json_object(content, path, "restore it from where the model is from")
