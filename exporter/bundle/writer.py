"""Replace a bundle: the new one is written to a temporary directory, and takes its place when it is complete."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dynexport.runtime.bundle.atomic import (
    PART_PATTERN,
    clear_leftovers,
    exchange,
    is_abandoned,
    part_directory,
    remove,
    sync,
    sync_tree,
)
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json_object
from dynexport.runtime.bundle.manifest import ENGINES, MANIFEST, NEXT
from dynexport.runtime.bundle.plain_files import read_plain

_OLD_MANIFEST = "manifest.old"


@contextlib.contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """Yield a new directory that becomes ``output`` when the block succeeds, and is removed when it does not.

    An earlier bundle stays until the new one is complete and on the disk. Then the two directories are exchanged in one
    step. If the directory must stay the same one (it is a mount point or a process's working directory, it holds files
    that are not the bundle's, or its parent is not writable), its files are replaced one by one: the manifest is
    removed first and written last, and the next conversion finishes an interrupted one. Of a link, the target is
    replaced.

    Raises:
        DynexportError: when ``output`` is something other than a bundle or an empty directory, or not writable.
    """
    with contextlib.ExitStack() as stack:
        try:
            place = _place(output)
            stays = place.is_dir() and _has_to_stay(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            part = stack.enter_context(part_directory(place if stays else place.parent))
            clear_leftovers(place)
        except (OSError, ValueError) as error:
            raise DynexportError(f"{output}: expected a place to write a bundle, found: {error}") from error
        try:
            yield part
            sync_tree(part)
        except OSError as error:
            raise DynexportError(f"{output}: cannot write the bundle ({error}); an earlier one is untouched") from error
        try:
            _take_place(part, place, stays=stays)
        except OSError as error:
            raise DynexportError(f"{output}: cannot put the bundle in its place ({error}); convert again") from error


def _place(output: Path) -> Path:
    """The directory to be replaced or made; an earlier replacement that was interrupted is finished first."""
    place = Path(os.path.realpath(output))
    if output.is_symlink() and not place.is_dir():
        raise DynexportError(f"{output}: expected a link to a directory, found one to none; choose another -o")
    if place.exists() and not place.is_dir():
        raise DynexportError(f"{output}: expected a directory or nothing, found a file; choose another -o")
    if place.is_dir():
        _finish(output, place)
        if not (place / MANIFEST).is_file() and any(not path.match(PART_PATTERN) for path in place.iterdir()):
            raise DynexportError(
                f"{output}: expected an earlier bundle or nothing, found other files; choose another -o"
            )
    return place


def _finish(output: Path, place: Path) -> None:
    """Move the files of a complete bundle into place, where the process that did so was killed."""
    if (place / NEXT).is_dir():
        if not is_abandoned(place / NEXT):
            raise DynexportError(f"{output}: another conversion is writing there; wait for it, or choose another -o")
        _move_in(place)


def _has_to_stay(place: Path) -> bool:
    """Return whether the directory must stay and get its files replaced, instead of being exchanged."""
    names = _names(place / MANIFEST)
    return (
        _is_mount(place)
        or not os.access(place.parent, os.W_OK | os.X_OK)
        or _is_a_working_directory(place)
        or any(not _belongs(path, names) for path in place.iterdir())
    )


def _is_mount(place: Path) -> bool:
    # os.path.ismount does not see what is mounted from the same file system, as containers do.
    with contextlib.suppress(OSError, IndexError):
        points = [line.split(b" ")[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]
        return os.fsencode(place) in [re.sub(rb"\\(\d{3})", lambda code: bytes([int(code[1], 8)]), p) for p in points]
    return place.is_mount()


def _is_a_working_directory(place: Path) -> bool:
    """Return whether it, or a directory below it, is a process's working directory: a shell would see the old files."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if link.readlink().is_relative_to(place):
                return True
    return False


def _names(manifest: Path) -> set[str]:
    """Return the names of a bundle's files by its manifest; only the manifest's own if it is unreadable."""
    try:
        files = parse_json_object(read_plain(manifest), manifest).get("files")
    except DynexportError:
        files = None
    return {MANIFEST, *(files if isinstance(files, dict) else ())}


def _belongs(path: Path, names: set[str]) -> bool:
    """Return whether a path in a bundle's directory belongs to the bundle and may be removed with it."""
    if path.is_dir():
        return path.name == ENGINES or path.match(PART_PATTERN)
    return path.name in names or path.match(PART_PATTERN)


def _take_place(part: Path, place: Path, *, stays: bool) -> None:
    if _take_free_name(part, place) or (not stays and exchange(part, place)):
        sync(place.parent)
        return
    for path in part.iterdir():
        if (place / path.name).is_dir():
            raise OSError(f"{place / path.name} is a directory")
    part.rename(place / NEXT)
    sync(place)  # from here on the new bundle is the valid one; the next conversion finishes it
    _move_in(place)


def _take_free_name(part: Path, place: Path) -> bool:
    """Rename ``part`` to ``place`` if that is free; return False if it exists, perhaps from another conversion."""
    if place.exists():
        return False
    try:
        part.rename(place)
    except OSError:
        if not place.exists():
            raise
        return False
    return True


def _move_in(place: Path) -> None:
    """Move the files of ``NEXT`` into the directory, instead of those of the bundle there.

    Meanwhile there is no manifest, so that no reader takes a mix of two bundles for one.
    """
    new, old = place / NEXT, place / NEXT / _OLD_MANIFEST
    if (new / MANIFEST).exists():  # the last that is moved; what a kill has interrupted goes on from where it was
        if (place / MANIFEST).exists():
            (place / MANIFEST).replace(old)
            sync(place)
        before, coming = _names(old), _names(new / MANIFEST)
        for path in place.iterdir():
            if path.name not in coming and path.name != NEXT and _belongs(path, before):
                remove(path)
    for path in sorted(new.iterdir(), key=lambda path: path.name == MANIFEST):
        if path != old:
            path.replace(place / path.name)
    sync(place)
    remove(new)
