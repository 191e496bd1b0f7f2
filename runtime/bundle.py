"""Opening a bundle: nothing of it is used before its manifest, versions, paths and hashes agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dynexport.runtime.checks import checked_path, shown
from dynexport.runtime.contract import first_problem
from dynexport.runtime.errors import DynexportError
from dynexport.runtime.manifest import MANIFEST, SCHEMA_VERSION, Graph, Manifest, Speedup
from dynexport.runtime.text import TEXT_FILES, Text

if TYPE_CHECKING:
    from onnx import TensorProto

_LARGEST_MANIFEST = 64 << 20


class Bundle:
    """A converted model on disk.

    Attributes:
        path: its directory.
        manifest: what it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open and check a bundle; every file is hashed.

        Raises:
            DynexportError: when it is no bundle, of another schema version, incomplete, or changed since it was made.
        """
        directory = checked_path("bundle", path)
        bundle = cls(directory, _read_manifest(directory))
        for name, file in bundle.manifest.files.items():
            _check_file(directory, name, file.bytes, file.sha256)
        for graph in bundle.manifest.graphs:
            if graph.file not in bundle.manifest.files:
                raise DynexportError(f"{directory}: graph {graph.name}: expected its file {graph.file} among files")
            _check_external_data(directory, graph, set(bundle.manifest.files))
        return bundle

    def text(self) -> Text:
        """The tokenizer and chat template. Its methods raise DynexportError where the bundle has none."""
        listed = [path for name in TEXT_FILES if (path := self.file(name))]
        try:
            return Text.from_files({path.name: path.read_bytes() for path in listed})
        except OSError as error:
            raise DynexportError(f"{self.path}: cannot read the tokenizer: {error}") from error

    def file(self, name: str) -> Path | None:
        """A file of the bundle, or None where it has none of that name."""
        return self.path / name if isinstance(name, str) and name in self.manifest.files else None

    def speedup(self, wanted: str | float | None) -> Speedup:
        """The kept set of a declared ratio.

        Args:
            wanted: a ratio or name; 1 is full depth; None is the first that the bundle declares.

        Raises:
            DynexportError: when the bundle does not declare it.
        """
        model, declared = self.manifest.model, self.manifest.speedups
        full = Speedup(name="dense", ratio=1.0, keep=tuple(range(model.layers)))
        if wanted is None:
            return declared[0] if declared else full
        text = wanted if isinstance(wanted, str) else shown(wanted)
        for speedup in (full, *declared):
            if text == speedup.name or _number(wanted) == speedup.ratio is not None:
                return speedup
        names = ", ".join(speedup.name for speedup in declared)
        raise DynexportError(f"{self.path}: speedup: expected 1{', ' if names else ''}{names}; found {text}")


def _number(value: str | float) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _read_manifest(directory: Path) -> Manifest:
    path = directory / MANIFEST
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise DynexportError(f"{path}: expected at most {_LARGEST_MANIFEST} bytes; this is no manifest")
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise DynexportError(
            f"{directory}: expected a bundle with a {MANIFEST}, found none; make one with: dynexport convert"
        ) from error
    except (ValueError, RecursionError) as error:  # of a path as well as of the JSON
        raise DynexportError(f"{path}: expected JSON, found something else ({error})") from error
    found = fields.get("schema_version") if isinstance(fields, dict) else None
    if found != SCHEMA_VERSION:
        newer = isinstance(found, int) and found > SCHEMA_VERSION
        advice = "it is of a newer dynexport, update this one" if newer else "convert the model again"
        raise DynexportError(f"{path}: schema_version: expected {SCHEMA_VERSION}, found {found!r:.40}; {advice}")
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise DynexportError(f"{path}: {first_problem(error)}") from error


def _check_file(directory: Path, name: str, size: int, sha256: str) -> None:
    path = directory / name
    if Path(name).name != name or path.is_symlink():
        raise DynexportError(f"{directory}: file {name!r}: expected a plain file of the bundle; it leads out of it")
    if not path.is_file() or path.stat().st_size != size:
        found = f"{path.stat().st_size} bytes" if path.is_file() else "none"
        raise DynexportError(f"{path}: expected {size} bytes, found {found}; the bundle is incomplete, convert again")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DynexportError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if digest != sha256:
        raise DynexportError(
            f"{path}: expected sha256 {sha256[:12]}.., found {digest[:12]}..; the file was changed, convert again"
        )


def _check_external_data(directory: Path, graph: Graph, files: set[str]) -> None:
    """A graph may point to data files of its own bundle only."""
    import onnx

    path = directory / graph.file
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own kinds
        raise DynexportError(f"{path}: expected an ONNX model, found something else ({error})") from error
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in files:
                raise DynexportError(
                    f"{path}: tensor {tensor.name}: external data {entry.value!r} is not a file of the bundle"
                )


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor in a protobuf message: initializers, attributes, subgraphs, functions, wherever they stand."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in [value] if hasattr(value, "ListFields") else value:
            if field.message_type.full_name == "onnx.TensorProto":
                yield part
            else:
                yield from _tensors(part)


__all__ = ["Bundle"]
