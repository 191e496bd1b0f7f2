"""The engines of a bundle on disk: ``engines/NAME-KEY.engine`` and, written last, its record ``NAME-KEY.json``."""

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
    """An engine that lies in a bundle.

    Attributes:
        path: of the engine.
        record: what is said of it.
        trusted: whether the user says that engines of this bundle may be run, whoever has built them.
    """

    path: Path
    record: EngineRecord
    trusted: bool

    def read(self) -> bytes:
        """The serialized engine.

        Raises:
            DynexportError: when it is not what its record says, or nobody trusts it.
        """
        self.check_trust()
        content = read_plain(self.path, "an engine", at_most=self.record.engine.bytes, follow=False, advice=_AGAIN)
        self._check_same(File(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
        return content

    def check(self) -> None:
        """Raise DynexportError when the engine is not what its record says."""
        self._check_same(File.of(self.path, "an engine", advice=_AGAIN))

    def check_trust(self) -> None:
        """Raise DynexportError when the engine was not built here and the user does not trust it either."""
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
    """The engine of a recipe, checked; None where there is none.

    Raises:
        DynexportError: when there is one, but damaged, or one that nobody trusts.
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
    """Every engine of a bundle, or why it cannot be used; contents are not hashed."""
    found: list[Stored | DynexportError] = []
    for record in sorted(_directory(bundle).glob(f"*{_RECORD}")):
        try:
            found.append(_read(bundle, record))
        except DynexportError as error:
            found.append(error)
    return found


@contextlib.contextmanager
def place_for_engine(bundle: Bundle) -> Iterator[Path]:
    """Yield a file to write an engine to, on the file system of the bundle; what is left there is removed.

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
    """Give a finished engine its name, and then its record: without that it does not count.

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
    # The file's name is one of the bundle's own; a graph's may be anything.
    files = {graph.name: graph.file for graph in bundle.manifest.graphs}
    return f"{Path(files[recipe.graph.name]).stem}-{recipe.key}"


def _path(bundle: Bundle, recipe: Recipe) -> Path:
    return _directory(bundle) / (_stem(bundle, recipe) + _ENGINE)


def _read(bundle: Bundle, path: Path) -> Stored:
    """A record, the engine's own content unread."""
    content = read_plain(path, "an engine's record", at_most=_LARGEST_RECORD, follow=False)
    try:
        record = EngineRecord.model_validate_json(content)
    except ValidationError as error:
        raise DynexportError(f"{path}: {first_problem(error)}; build the engine again") from error
    return Stored(path.with_suffix(_ENGINE), record, bundle.trust_engines)
