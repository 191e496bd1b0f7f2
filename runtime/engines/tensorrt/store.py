"""The engines of a bundle on disk: ``engines/NAME-KEY.engine`` and, written last, its record ``NAME-KEY.json``."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dynexport.runtime.bundle import Bundle
from dynexport.runtime.contract import first_problem
from dynexport.runtime.engines.tensorrt.record import EngineRecord, Recipe
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import File

ENGINES = "engines"
_ENGINE, _RECORD, _PART = ".engine", ".json", ".part"
_LARGEST_RECORD = 1 << 20


@dataclass(frozen=True)
class Stored:
    """An engine that lies in a bundle.

    Attributes:
        path: of the engine.
        record: what is said of it.
    """

    path: Path
    record: EngineRecord

    def read(self) -> bytes:
        """The serialized engine.

        Raises:
            DynexportError: when it is not what its record says.
        """
        content = _content(self.path)
        found = File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        _check_same(self.path, self.record.engine, found)
        return content

    def check(self) -> None:
        """Raise DynexportError when the engine is not what its record says."""
        _check_same(self.path, self.record.engine, _file(self.path))


def find(bundle: Bundle, recipe: Recipe) -> Stored | None:
    """The engine of a recipe, checked; None where there is none.

    Raises:
        DynexportError: when there is one, but damaged.
    """
    engine = _path(bundle, recipe)
    if not engine.with_suffix(_RECORD).exists():
        return None
    stored = _read(engine.with_suffix(_RECORD))
    if stored.record.recipe != recipe:
        raise DynexportError(
            f"{engine.with_suffix(_RECORD)}: expected the record of engine {recipe.key}, found that of "
            f"{stored.record.recipe.key}; build it again"
        )
    stored.check()
    return stored


def stored_engines(bundle: Bundle) -> list[Stored | DynexportError]:
    """Every engine of a bundle, or why it cannot be used; contents are not hashed."""
    found: list[Stored | DynexportError] = []
    for record in sorted(_directory(bundle).glob(f"*{_RECORD}")):
        try:
            found.append(_read(record))
        except DynexportError as error:
            found.append(error)
    return found


@contextlib.contextmanager
def part_file(bundle: Bundle, recipe: Recipe) -> Iterator[Path]:
    """A place to write an engine to, on the file system of the bundle; what is left there is removed.

    Raises:
        DynexportError: when the bundle cannot be written to.
    """
    directory = _directory(bundle)
    try:
        directory.mkdir(exist_ok=True)
        _clear_leftovers(directory)
        part = directory / f".{_stem(bundle, recipe)}.{os.getpid()}{_PART}"
        part.touch()
    except OSError as error:
        raise DynexportError(f"{directory}: expected a place to write engines, found: {error.strerror}") from error
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def put(bundle: Bundle, record: EngineRecord, part: Path) -> Stored:
    """Give a finished engine its name, and then its record: without that it does not count.

    Raises:
        DynexportError: when the bundle cannot be written to.
    """
    engine = _path(bundle, record.recipe)
    described = part.with_suffix(_RECORD + _PART)
    try:
        described.write_text(record.model_dump_json(indent=1) + "\n")
        for source, place in ((part, engine), (described, engine.with_suffix(_RECORD))):
            _sync(source)
            source.replace(place)
        _sync(engine.parent)
    except OSError as error:
        raise DynexportError(f"{engine}: cannot write the engine ({error.strerror})") from error
    finally:
        described.unlink(missing_ok=True)
    return Stored(engine, record)


def entry(path: Path) -> File:
    """Size and hash of a finished engine."""
    return _file(path)


def _directory(bundle: Bundle) -> Path:
    directory = bundle.path / ENGINES
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise DynexportError(f"{directory}: expected a directory of the bundle, found a link or a file; remove it")
    return directory


def _stem(bundle: Bundle, recipe: Recipe) -> str:
    # The file's name is one of the bundle's own; a graph's may be anything.
    files = {graph.name: graph.file for graph in bundle.manifest.graphs}
    return f"{Path(files[recipe.graph.name]).stem}-{recipe.key}"


def _path(bundle: Bundle, recipe: Recipe) -> Path:
    return _directory(bundle) / (_stem(bundle, recipe) + _ENGINE)


def _read(path: Path) -> Stored:
    """A record, the engine's own content unread."""
    try:
        if path.is_symlink() or path.stat().st_size > _LARGEST_RECORD:
            raise DynexportError(f"{path}: expected an engine's record, found a link or a file of another kind")
        record = EngineRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except ValidationError as error:
        raise DynexportError(f"{path}: {first_problem(error)}; build the engine again") from error
    return Stored(path.with_suffix(_ENGINE), record)


def _check_same(path: Path, expected: File, found: File) -> None:
    if found != expected:
        raise DynexportError(
            f"{path}: expected {expected.bytes} bytes of sha256 {expected.sha256[:12]}.., found {found.bytes} of "
            f"{found.sha256[:12]}..; the engine was changed, build it again"
        )


def _content(path: Path) -> bytes:
    _check_plain(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _file(path: Path) -> File:
    _check_plain(path)
    try:
        with path.open("rb") as file:
            return File(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _check_plain(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise DynexportError(f"{path}: expected an engine, found none; build it again")


def _clear_leftovers(directory: Path) -> None:
    """Remove what runs that are no longer alive left behind."""
    for left in directory.glob(f".*{_PART}"):
        owner = left.name.removesuffix(_PART).removesuffix(_RECORD).rsplit(".", 1)[-1]
        # Of our own number too: in a container every run may have the same one.
        if owner == str(os.getpid()) or (owner.isdigit() and not Path(f"/proc/{owner}").exists()):
            left.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring it to the disk before it gets its name, so that a power cut leaves no half engine under it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
