"""Open a bundle: its manifest, versions, paths and hashes are checked before any file is used."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dynexport.runtime.bundle.checks import checked_path, is_integer, shown
from dynexport.runtime.bundle.contract import first_problem
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.json_text import parse_json
from dynexport.runtime.bundle.manifest import MANIFEST, NEXT, SCHEMA_VERSION, Depth, File, Manifest
from dynexport.runtime.bundle.plain_files import open_plain, read_plain

if TYPE_CHECKING:
    from onnx import TensorProto

_LARGEST_MANIFEST = 16 << 20
# Larger files are hashed by ``Bundle.check`` only: hashing tens of gigabytes would delay the first token.
_HASHED_WHEN_OPENED = 64 << 20
_MAKE_ONE = "make one with: dynexport convert"


@dataclass(frozen=True)
class _Identity:
    """The identity of a file: it differs once the file is replaced or written to."""

    device: int
    inode: int
    bytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> _Identity:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Bundle:
    """A converted model on disk.

    A file that changed after the bundle was opened raises an error when it is loaded: see ``unchanged``.

    Args:
        trust_engines: whether TensorRT may load engines that were not built on this machine.

    Attributes:
        path: the directory of the bundle.
        manifest: the parsed ``manifest.json``.
    """

    def __init__(self, path: Path, manifest: Manifest, *, trust_engines: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.trust_engines = trust_engines
        self._opened = {name: _identity(path / name) for name in (MANIFEST, *manifest.files)}

    @classmethod
    def open(cls, path: str | Path, *, trust_engines: bool = False) -> Bundle:
        """Open a bundle and check its versions, paths, file sizes, and the hashes of files of up to 64 MiB.

        Raises:
            DynexportError: when it is not a bundle, has another schema version, is incomplete, or was changed.
        """
        directory = checked_path("bundle", path)
        before = _identity(directory / MANIFEST)
        bundle = cls(directory, _read_manifest(directory), trust_engines=trust_engines)
        bundle._opened[MANIFEST] = before  # taken before reading, so that a replacement during reading is found
        for name, file in bundle.manifest.files.items():
            bundle._check_file(name, hashed=file.bytes <= _HASHED_WHEN_OPENED)
        for graph in bundle.manifest.files_with_graphs:
            if graph.file not in bundle.manifest.files:
                raise DynexportError(f"{directory}: graph {graph.name}: expected its file {graph.file} among files")
            _check_external_data(directory / graph.file, bundle.read(graph.file), set(bundle.manifest.files))
        bundle._check_unchanged()
        return bundle

    def check(self) -> None:
        """Check the hash of every file. Raises DynexportError for a file that differs from the manifest."""
        with self.unchanged():
            for name in self.manifest.files:
                self._check_file(name, hashed=True)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Check, before and after this block, that the files on disk are those that were opened.

        Raises:
            DynexportError: when a file was written to, or the bundle was replaced.
        """
        self._check_unchanged()
        try:
            yield
        finally:
            self._check_unchanged()

    def read(self, name: str) -> bytes:
        """Return the content of a small file of the bundle, such as a graph or a tokenizer.

        Raises:
            DynexportError: when it cannot be read, or has changed since the bundle was opened.
        """
        content = read_plain(self.path / name, follow=False)
        self._check_unchanged(name)
        return content

    def file(self, name: str) -> Path | None:
        """Return the path of a file of the bundle, or None if there is none of that name."""
        return self.path / name if isinstance(name, str) and name in self.manifest.files else None

    def depth(self, wanted: str | float | None) -> Depth:
        """Return a declared depth.

        Args:
            wanted: a ratio or name; 1 and "full" are full depth; "exit" is exit-8 if no other begins so. None is the
                first depth that the checkpoint was trained for, or full depth if there is none.

        Raises:
            DynexportError: when the bundle does not declare it.
        """
        full, declared = self.manifest.full, self.manifest.depths
        if wanted is None:
            return next((depth for depth in declared if depth.trained), full)
        text = wanted if isinstance(wanted, str) else shown(wanted)
        for depth in (full, *declared):
            if text == depth.name or _number(wanted) == depth.ratio is not None:
                return depth
        begin = [depth for depth in declared if depth.name.startswith(f"{text}-")]
        if len(begin) == 1:
            return begin[0]
        names = ", ".join(depth.name for depth in declared)
        raise DynexportError(f"{self.path}: depth: expected 1{', ' if names else ''}{names}; found {text}")

    def _check_file(self, name: str, *, hashed: bool) -> None:
        file, path = self.manifest.files[name], self.path / name
        if name in ("", "..") or Path(name).name != name or os.path.islink(path):  # noqa: PTH114 - raises nothing
            raise DynexportError(f"{self.path}: file {name!r}: expected a plain file of the bundle; it leads out of it")
        with open_plain(path, f"{file.bytes} bytes", follow=False) as opened:
            if (size := os.fstat(opened.fileno()).st_size) != file.bytes:
                raise DynexportError(
                    f"{path}: expected {file.bytes} bytes, found {size} bytes; the bundle is incomplete, convert again"
                )
        if hashed and (found := File.of(path)) != file:
            raise DynexportError(
                f"{path}: expected sha256 {file.sha256[:12]}.., found {found.sha256[:12]}..; the file was changed, "
                "convert again"
            )
        self._check_unchanged(name)

    def _check_unchanged(self, *names: str) -> None:
        for name in names or self._opened:
            if _identity(self.path / name) != self._opened[name]:
                raise DynexportError(
                    f"{self.path / name}: expected the file that was there when the bundle was opened, found it "
                    "replaced or written to; open the bundle again"
                )


def _identity(path: Path) -> _Identity | None:
    """Return the identity of the file that a path names now, or None if there is none."""
    try:
        return _Identity.of(path.stat(follow_symlinks=False))
    except (OSError, ValueError):
        return None


def _number(value: str | float) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if _identity(path) is None:
        raise DynexportError(
            f"{directory}: expected a bundle with a {MANIFEST}, found none; "
            + ("a conversion was interrupted, run it again" if _identity(directory / NEXT) is not None else _MAKE_ONE)
        )
    return parse_manifest(read_plain(path, at_most=_LARGEST_MANIFEST, follow=False), path)


def parse_manifest(content: bytes, where: object) -> Manifest:
    """Return the manifest of a JSON text. Raises DynexportError, which names ``where``, when it is none."""
    fields = parse_json(content, where)
    found = fields.get("schema_version") if isinstance(fields, dict) else None
    if found != SCHEMA_VERSION or not is_integer(found):
        newer = isinstance(found, int) and is_integer(found) and found > SCHEMA_VERSION
        advice = "it was made by a newer dynexport, update this one" if newer else "convert the model again"
        raise DynexportError(f"{where}: schema_version: expected {SCHEMA_VERSION}, found {found!r:.40}; {advice}")
    try:
        return Manifest.model_validate_json(json.dumps(fields), strict=True)
    except ValidationError as error:
        raise DynexportError(f"{where}: {first_problem(error)}") from error


def _check_external_data(path: Path, content: bytes, files: set[str]) -> None:
    """Raise DynexportError for a graph whose external data is not a file of the bundle."""
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf raises its own classes
        raise DynexportError(f"{path}: expected an ONNX model, found something else ({error})") from error
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in files:
                raise DynexportError(
                    f"{path}: tensor {tensor.name}: external data {entry.value!r} is not a file of the bundle"
                )


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Yield every tensor in a protobuf message, at any depth: initializers, attributes, subgraphs, functions."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.full_name == "onnx.TensorProto":
                yield part
            else:
                yield from _tensors(part)


__all__ = ["Bundle"]
