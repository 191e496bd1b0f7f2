"""Write a bundle as a model into a model repository of Triton."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path

from dynexport.exporter.triton.config import MARK, config_text
from dynexport.runtime.bundle.atomic import exchange, part_directory, sync, sync_tree
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import MANIFEST
from dynexport.runtime.bundle.plain_files import open_plain

CONFIG, VERSION, MODEL, BUNDLE = "config.pbtxt", "1", "model.py", "bundle"


def export(
    bundle: Bundle,
    repository: Path,
    name: str,
    settings: Mapping[str, str],
    *,
    link: bool = False,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Path:
    """Write a model of Triton's Python backend: REPOSITORY/NAME with config.pbtxt, 1/model.py and 1/bundle.

    The model's directory appears when it is complete; an earlier one is exchanged for it.

    Args:
        bundle: an opened bundle.
        repository: the model repository; it is made if it does not exist.
        name: the model's name.
        settings: see ``config_text``.
        link: true makes 1/bundle a link to the bundle; false copies its files.
        force: true replaces an earlier export of this name.
        progress: receives the name of a file and how many bytes of all are copied.

    Returns:
        The model's directory.

    Raises:
        DynexportError: for a name that is not one, a directory that is not to be replaced, or one that cannot be
            written.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,199}", name, re.ASCII):
        raise DynexportError(f"--name: expected letters, digits and . + - _, found {name!r:.80}")
    place = repository / name
    try:
        repository.mkdir(parents=True, exist_ok=True)
        _check_free(place, force)
        with part_directory(repository) as part:
            _fill(part, bundle, config_text(name, settings), link, progress)
            sync_tree(part)
            _check_free(place, force)
            _put(part, place)
            sync(repository)
    except (OSError, ValueError) as error:
        raise DynexportError(f"{place}: expected a place to write a model, found: {error}") from error
    return place


def _check_free(place: Path, force: bool) -> None:
    """Raise DynexportError for a directory that must not be replaced."""
    if not os.path.lexists(place):
        return
    if not force:
        raise DynexportError(f"{place}: expected no model of this name, found one; replace it with --force")
    first = b""
    if place.is_dir() and not place.is_symlink():
        with contextlib.suppress(DynexportError), open_plain(place / CONFIG) as file:
            first = file.readline(1000)
    if first.decode("utf-8", "replace").rstrip() != MARK:
        raise DynexportError(
            f"{place}: expected an earlier export or nothing, found other files; choose another --name"
        )


def _fill(part: Path, bundle: Bundle, config: str, link: bool, progress: Callable[[str, int, int], None]) -> None:
    """Write all files; Triton looks for config.pbtxt, which comes last."""
    version = part / VERSION
    version.mkdir()
    (version / MODEL).write_bytes(files("dynexport.exporter.triton").joinpath(MODEL).read_bytes())
    if link:
        (version / BUNDLE).symlink_to(bundle.path.resolve(), target_is_directory=True)
    else:
        (version / BUNDLE).mkdir()
        with bundle.unchanged():
            for source in _copied(bundle, progress):
                shutil.copyfile(source, version / BUNDLE / source.name)
    (part / CONFIG).write_text(config, encoding="utf-8")


def _copied(bundle: Bundle, progress: Callable[[str, int, int], None]) -> Iterator[Path]:
    """Yield a bundle's files, the manifest last."""
    sizes = {name: file.bytes for name, file in bundle.manifest.files.items()}
    done, total = 0, sum(sizes.values())
    for name, size in sizes.items():
        progress(name, done, total)
        yield bundle.path / name
        done += size
    yield bundle.path / MANIFEST


def _put(part: Path, place: Path) -> None:
    """Give a complete directory its name; what has the name is left in the part, to be removed with it."""
    if not place.exists():
        part.rename(place)
    elif not exchange(part, place):
        raise OSError("an earlier model that this file system cannot exchange; remove it first")


__all__ = ["BUNDLE", "CONFIG", "MODEL", "VERSION", "export"]
