"""Store engines in a bundle: ``engines/NAME-KEY.engine`` and, written last, its record ``NAME-KEY.json``."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dynexport.runtime.bundle.atomic import part_file, publish, write_file
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.contract import first_problem
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import ENGINES, File
from dynexport.runtime.bundle.plain_files import read_plain
from dynexport.runtime.engines.tensorrt.known import is_known, prepare, remember
from dynexport.runtime.engines.tensorrt.record import EngineRecord, Recipe

_ENGINE, _RECORD = ".engine", ".json"
_LARGEST_RECORD = 1 << 20
_AGAIN = "build it again"


@dataclass(frozen=True)
class Stored:
    """An engine stored in a bundle.

    Attributes:
        path: path of the engine.
        record: record of the engine.
        trusted: whether the user trusts all engines of this bundle, including those built elsewhere.
    """

    path: Path
    record: EngineRecord
    trusted: bool

    def read(self) -> bytes:
        """Return the serialized engine.

        Raises:
            DynexportError: when it differs from its record, or is not trusted.
        """
        self.check_trust()
        content = read_plain(self.path, "an engine", at_most=self.record.engine.bytes, follow=False, advice=_AGAIN)
        self._check_same(File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
        return content

    def check(self) -> None:
        """Raise DynexportError when the engine's size or hash differs from its record."""
        self._check_same(File.of(self.path, "an engine", advice=_AGAIN))

    def check_trust(self) -> None:
        """Raise DynexportError when the engine was built elsewhere and the user does not trust the bundle's engines."""
        if not (self.trusted or is_known(self.record.engine.sha256)):
            raise DynexportError(
                f"{self.path}: expected an engine that was built here, found one from elsewhere, which is native code "
                "that cannot be checked; build it again with: dynexport build --force, or say --trust-engines if you "
                "would run a program of whoever built it"
            )

    def _check_same(self, found: File) -> None:
        expected = self.record.engine
        if found != expected:
            raise DynexportError(
                f"{self.path}: expected {expected.bytes} bytes of sha256 {expected.sha256[:12]}.., found {found.bytes} "
                f"of {found.sha256[:12]}..; the engine was changed, build it again"
            )


def find(bundle: Bundle, recipe: Recipe) -> Stored | None:
    """Return the engine of a recipe, checked; None if there is none.

    Raises:
        DynexportError: when the engine is damaged or not trusted.
    """
    engine = _path(bundle, recipe)
    if not engine.with_suffix(_RECORD).exists():
        return None
    stored = _read(bundle, engine.with_suffix(_RECORD))
    if stored.record.recipe != recipe:
        raise DynexportError(
            f"{engine.with_suffix(_RECORD)}: expected the record of engine {recipe.key}, found that of "
            f"{stored.record.recipe.key}; build it again"
        )
    stored.check_trust()
    stored.check()
    return stored


def stored_engines(bundle: Bundle) -> list[Stored | DynexportError]:
    """Return every engine of a bundle, or the error for one with an invalid record; engines are not hashed."""
    found: list[Stored | DynexportError] = []
    for record in sorted(_directory(bundle).glob(f"*{_RECORD}")):
        try:
            found.append(_read(bundle, record))
        except DynexportError as error:
            found.append(error)
    return found


@contextlib.contextmanager
def place_for_engine(bundle: Bundle) -> Iterator[Path]:
    """Yield a temporary file in the bundle to write an engine to; it is removed if it is not published.

    Raises:
        DynexportError: when the bundle, or the list of engines that were built here, cannot be written to.
    """
    prepare()
    directory = _directory(bundle)
    with contextlib.ExitStack() as stack:
        try:
            directory.mkdir(exist_ok=True)
            part = stack.enter_context(part_file(directory))
        except OSError as error:
            raise DynexportError(f"{directory}: expected a place to write engines, found: {error.strerror}") from error
        yield part


def put(bundle: Bundle, record: EngineRecord, part: Path) -> Stored:
    """Rename a finished engine to its final name, then write its record, without which it is ignored.

    Raises:
        DynexportError: when the bundle cannot be written to.
    """
    engine = _path(bundle, record.recipe)
    try:
        remember(record.engine.sha256)
        publish(part, engine)
        write_file(engine.with_suffix(_RECORD), record.model_dump_json(indent=1).encode() + b"\n")
    except OSError as error:
        raise DynexportError(f"{engine}: cannot write the engine ({error.strerror})") from error
    return Stored(engine, record, bundle.trust_engines)


def _directory(bundle: Bundle) -> Path:
    directory = bundle.path / ENGINES
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise DynexportError(f"{directory}: expected a directory of the bundle, found a link or a file; remove it")
    return directory


def _stem(bundle: Bundle, recipe: Recipe) -> str:
    # A file's name was checked when the bundle was opened; a graph's name may hold any characters.
    files = {graph.name: graph.file for graph in bundle.manifest.graphs}
    return f"{Path(files[recipe.graph.name]).stem}-{recipe.key}"


def _path(bundle: Bundle, recipe: Recipe) -> Path:
    return _directory(bundle) / (_stem(bundle, recipe) + _ENGINE)


def _read(bundle: Bundle, path: Path) -> Stored:
    """Return a stored engine from its record; the engine itself is not read."""
    content = read_plain(path, "an engine's record", at_most=_LARGEST_RECORD, follow=False)
    try:
        record = EngineRecord.model_validate_json(content)
    except ValidationError as error:
        raise DynexportError(f"{path}: {first_problem(error)}; build the engine again") from error
    return Stored(path.with_suffix(_ENGINE), record, bundle.trust_engines)
