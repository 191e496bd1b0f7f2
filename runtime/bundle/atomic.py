"""Write files and directories atomically: a name holds the old or the new content, even after a kill or power cut.

An unfinished file (a part) has a random name, ``.dynexport-*.part``, and is locked by the process that writes it.
Process ids would not work: two containers may use the same ones. A part without a lock was left behind by a process
that ended; the next write to the same directory removes it. On a file system without locks, parts are never removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.plain_files import kind_of

_PREFIX, _SUFFIX = ".dynexport-", ".part"
PART_PATTERN = f"{_PREFIX}*{_SUFFIX}"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: a link is kept and its target replaced; a pipe or device is written to directly.

    Raises:
        OSError, ValueError: when it cannot be written; an existing file is then unchanged.
    """
    if not _is_replaceable(path):
        with path.open("wb") as file:
            file.write(content)
        return
    target = Path(os.path.realpath(path))
    with part_file(target.parent) as part:
        part.write_bytes(content)
        with contextlib.suppress(FileNotFoundError):
            part.chmod(stat.S_IMODE(target.stat().st_mode))
        publish(part, target)


def check_writable(path: Path, option: str) -> None:
    """Check that ``write_file`` can write to a path, before any work is done.

    Args:
        option: the option that named the file, for the error message, such as ``"--json"``.

    Raises:
        DynexportError: when it cannot.
    """
    try:
        if not _is_replaceable(path):
            return
        target = Path(os.path.realpath(path))
        if target.exists():
            os.close(os.open(target, os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        with part_file(target.parent):
            pass
    except (OSError, ValueError) as error:
        raise not_writable(path, option, error) from error


def not_writable(path: Path, option: str, error: OSError | ValueError) -> DynexportError:
    """Return the error for a file that cannot be written, with the reason."""
    found = error.strerror if isinstance(error, OSError) else error
    return DynexportError(f"{option} {path}: expected a file to write, found {found}")


@contextlib.contextmanager
def part_file(directory: Path) -> Iterator[Path]:
    """Yield a new, empty file in a directory, to be written and then given its name with ``publish``.

    If it is not published, it is removed at the end. Parts left behind by ended processes are removed first.

    Raises:
        OSError: when the directory cannot be written to.
    """
    with _part(directory, _new_file) as part:
        yield part


@contextlib.contextmanager
def part_directory(directory: Path) -> Iterator[Path]:
    """Yield a new, empty directory in a directory; cleanup and errors as for ``part_file``."""
    with _part(directory, Path.mkdir) as part:
        yield part


def publish(part: Path, target: Path) -> None:
    """Rename a finished part to its final name; an existing file of that name is replaced.

    The content is flushed to disk before the rename, so that a power cut leaves the old file or the new one.
    """
    sync(part)
    part.replace(target)
    sync(target.parent)


def exchange(part: Path, place: Path) -> bool:
    """Swap two directories in one step; return False where kernel or file system cannot (Linux renameat2)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(part), _AT_FDCWD, os.fsencode(place), _RENAME_EXCHANGE) == 0)


def sync(path: Path) -> None:
    """Flush a file, or a directory's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush a directory and every file below it to disk; a link is part of its directory."""
    for path in directory.iterdir():
        if path.is_symlink():
            continue
        if path.is_dir():
            sync_tree(path)
        else:
            sync(path)
    sync(directory)


def clear_leftovers(directory: Path) -> None:
    """Remove the parts in a directory whose process has ended; parts that are still being written are kept."""
    for left in directory.glob(PART_PATTERN):
        if is_abandoned(left):
            remove(left)


def is_abandoned(part: Path) -> bool:
    """Return whether the process that wrote a part has ended, that is, whether its lock is free."""
    try:
        descriptor = _open_part(part)
    except OSError:
        return False
    try:
        return lock(descriptor) is True
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a directory with everything in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _part(directory: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    clear_leftovers(directory)
    part, descriptor = _locked_part(directory, make)
    try:
        yield part
    finally:
        remove(part)
        os.close(descriptor)


def _locked_part(directory: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        part = directory / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
        make(part)
        # Before the lock is taken, another process may remove the part as a leftover.
        try:
            descriptor = _open_part(part)
        except FileNotFoundError:
            continue
        if lock(descriptor) is not False and part.exists():
            return part, descriptor
        os.close(descriptor)


def _new_file(path: Path) -> None:
    path.touch(exist_ok=False)


def _open_part(path: Path) -> int:
    mode = path.lstat().st_mode
    if stat.S_ISDIR(mode):
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    if stat.S_ISREG(mode):
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    raise OSError(f"{path} is {kind_of(mode)}")


def lock(descriptor: int) -> bool | None:
    """Lock a file until it is closed; return whether it is locked now, or None if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_replaceable(path: Path) -> bool:
    """Return whether a path can be replaced by a new file: it is missing, or a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return True
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(None, kind_of(mode))
    home = os.path.realpath(path.parent)
    # /dev/stdout points to a file that the shell has opened: write to it instead of replacing it.
    return stat.S_ISREG(mode) and home != "/dev" and not home.startswith("/proc/")
