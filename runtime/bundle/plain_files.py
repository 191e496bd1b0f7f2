"""Open and read untrusted files: regular files only, unless the user names a pipe."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

from dynexport.runtime.bundle.errors import DynexportError

# For files that are read as a whole: configs, tokenizers, graphs without weights. Weights are not read so.
LARGEST_SMALL_FILE = 512 << 20
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(path: Path, expected: str = "a file", *, follow: bool = True, advice: str = "") -> BufferedReader:
    """Open a regular file for reading.

    Args:
        expected: the expected kind of file, for the error, such as ``"a text file"``.
        follow: whether the last part of the path may be a link.
        advice: the advice at the end of the error.

    Raises:
        DynexportError: when it is missing, not a regular file, or not readable.
    """
    return _open(path, expected, follow, advice, stat.S_ISREG)


def open_named(path: Path, expected: str = "a file", *, advice: str = "") -> BufferedReader:
    """Open a path that the user named: a file, pipe or device, such as a shell's ``<(..)`` or /dev/stdin.

    Its content may be endless; a pipe without a writer is empty. Arguments and errors as for ``open_plain``.
    """
    return _open(path, expected, True, advice, _can_be_read)


def _can_be_read(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _open(path: Path, expected: str, follow: bool, advice: str, accepts: Callable[[int], bool]) -> BufferedReader:
    # Without O_NONBLOCK, opening a pipe would wait for a writer.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _refusal(path, expected, _found(path, error), advice) from error
    mode = os.fstat(descriptor).st_mode
    if not accepts(mode):
        os.close(descriptor)
        raise _refusal(path, expected, kind_of(mode), advice)
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_plain(
    path: Path,
    expected: str = "a file",
    *,
    at_most: int = LARGEST_SMALL_FILE,
    follow: bool = True,
    advice: str = "",
) -> bytes:
    """Return the content of a regular file.

    Args:
        at_most: most bytes; a larger file is refused before it is read.

    Raises:
        DynexportError: as for ``open_plain``, and when the file is too large.
    """
    with open_plain(path, expected, follow=follow, advice=advice) as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise _refusal(path, f"{expected} of at most {at_most} bytes", str(size), advice)
        try:
            return file.read(at_most)
        except OSError as error:
            raise _refusal(path, expected, _found(path, error), advice) from error


def hash_plain(path: Path, expected: str = "a file", *, follow: bool = True, advice: str = "") -> tuple[str, int]:
    """Return the sha256 (hexadecimal) and size (bytes) of a regular file; errors as for ``open_plain``."""
    with open_plain(path, expected, follow=follow, advice=advice) as file:
        try:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return digest, file.tell()
        except OSError as error:
            raise _refusal(path, expected, _found(path, error), advice) from error


def kind_of(mode: int) -> str:
    """Return the kind of file that an ``st_mode`` stands for, as words."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a file")


def _refusal(path: Path, expected: str, found: str, advice: str) -> DynexportError:
    return DynexportError(f"{path}: expected {expected}, found {found}{'; ' if advice else ''}{advice}")


def _found(path: Path, error: OSError | ValueError) -> str:
    """Return words for what was found at a path that cannot be opened or read."""
    if isinstance(error, ValueError):
        return f"none that can be read ({error})"
    if error.errno == errno.ENOENT:
        return "a link that leads nowhere" if path.is_symlink() else "none"
    if error.errno == errno.ELOOP:
        return "a link"
    if error.errno == errno.ENXIO:
        return "a socket"
    return f"none that can be read ({error.strerror})"


__all__ = ["LARGEST_SMALL_FILE", "hash_plain", "kind_of", "open_named", "open_plain", "read_plain"]
