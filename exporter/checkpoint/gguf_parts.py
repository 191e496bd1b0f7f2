"""A GGUF model in several files, as llama-gguf-split writes them; the first one holds the metadata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dynexport.exporter.checkpoint.gguf_header import GgufHeader, read_header
from dynexport.runtime.bundle.errors import DynexportError

_COUNT, _NUMBER, _TENSORS = "split.count", "split.no", "split.tensors.count"
_LAST = "-{number:05}-of-{count:05}.gguf"


def read_parts(path: Path) -> GgufHeader:
    """Read the header of a model in one file or in several parts; it lists the tensors of all parts.

    Args:
        path: the file, or the first part; the other parts are in the same directory.

    Raises:
        DynexportError: when a part is damaged, missing, or of another model, or ``path`` is not the first part.
    """
    first = read_header(path)
    count = first.metadata.get(_COUNT, 1)
    if count in (0, 1):
        return first
    if type(count) is not int or count < 0:
        raise DynexportError(f"{path}: metadata {_COUNT}: expected a number of parts, found {count!r:.80}")
    last = _LAST.format(number=1, count=count)
    if not path.name.endswith(last) or first.metadata.get(_NUMBER) != 0:
        raise DynexportError(
            f"{path}: is one of {count} parts; name the first, which ends in {last}, with the others beside it, or "
            "join them with llama-gguf-split --merge"
        )
    tensors = dict(first.tensors)
    for number in range(2, count + 1):
        name = path.name.removesuffix(last) + _LAST.format(number=number, count=count)
        part = _read_part(path, name, number, count)
        if twice := sorted(tensors.keys() & part.tensors.keys()):
            raise DynexportError(
                f"{part.path}: tensor {twice[0]}: expected in one part, found in two; download all parts again"
            )
        tensors |= part.tensors
    expected = first.metadata.get(_TENSORS, len(tensors))
    if expected != len(tensors):
        raise DynexportError(
            f"{path}: expected {expected!r:.40} tensors in {count} parts, found {len(tensors)}; download them again"
        )
    return replace(first, tensors=tensors)


def _read_part(first: Path, name: str, number: int, count: int) -> GgufHeader:
    path = first.with_name(name)
    if not path.is_file():
        raise DynexportError(
            f"{first}: is one of {count} parts, and part {number}, {name}, is not beside it; complete the download"
        )
    part = read_header(path)
    if (part.metadata.get(_NUMBER), part.metadata.get(_COUNT)) != (number - 1, count):
        raise DynexportError(
            f"{path}: expected part {number} of {count}, found {_NUMBER} {part.metadata.get(_NUMBER)!r:.40} and "
            f"{_COUNT} {part.metadata.get(_COUNT)!r:.40}; download all parts again"
        )
    return part
