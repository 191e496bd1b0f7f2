"""Writing a bundle: into a temporary sibling that takes the bundle's place only when everything is there."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import MANIFEST, File

_SUFFIX = ".part"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A fresh directory that becomes ``output`` when the block succeeds, and is removed when it does not.

    An earlier bundle at ``output`` stays until the new one takes its place in one step. What a killed run left
    behind is cleared away by the next.

    Raises:
        DynexportError: when ``output`` is something other than a bundle or an empty directory, or not writable.
    """
    # Not resolve(): a link at the bundle's own place has to be seen, not followed.
    output = Path.cwd() / output
    try:
        _refuse_strangers(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(output)
        part = output.parent / f".{output.name}.{os.getpid()}{_SUFFIX}"
        part.mkdir()
    except (OSError, ValueError) as error:
        raise DynexportError(f"{output}: expected a place to write a bundle, found: {error}") from error
    try:
        yield part
        _sync(part)
        _take_place(part, output)
    except OSError as error:
        raise DynexportError(f"{output}: cannot write the bundle ({error}); an earlier one is untouched") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_entry(path: Path) -> File:
    """Size and hash of a finished file."""
    with path.open("rb") as file:
        return File(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def _refuse_strangers(output: Path) -> None:
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise DynexportError(f"{output}: expected a directory or nothing, found a file; choose another -o")
    if output.is_dir() and any(output.iterdir()) and not (output / MANIFEST).is_file():
        raise DynexportError(f"{output}: expected an earlier bundle or nothing, found other files; choose another -o")


def _clear_leftovers(output: Path) -> None:
    """Remove temporary siblings of runs that are no longer alive."""
    for left in output.parent.glob(f".{glob.escape(output.name)}.*{_SUFFIX}"):
        owner = left.name.removesuffix(_SUFFIX).rsplit(".", 1)[-1]
        # Of our own number too: in a container every run may have the same one.
        if owner == str(os.getpid()) or (owner.isdigit() and not Path(f"/proc/{owner}").exists()):
            shutil.rmtree(left, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Bring the files to the disk before they get their name, so that a power cut leaves the old or the new."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(part: Path, output: Path) -> None:
    if not output.exists():
        part.rename(output)
    elif not _exchange(part, output):
        old = part.with_suffix(".old" + _SUFFIX)
        output.rename(old)
        part.rename(output)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(part: Path, output: Path) -> bool:
    """Swap two directories in one step, where kernel and file system can (Linux renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(part), _AT_FDCWD, os.fsencode(output), _RENAME_EXCHANGE) == 0)
