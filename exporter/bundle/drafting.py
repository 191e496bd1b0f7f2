"""Store in a bundle how its tokens are drafted."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dynexport.exporter.bundle.ngrams import Learned
from dynexport.runtime.bundle.atomic import write_file
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.drafting import Drafting, Ngrams
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import MANIFEST, File
from dynexport.runtime.generation.speculation import Speculation

_NGRAM_FILES = "ngrams-*.bin"


def store_drafting(bundle: Bundle, drafting: Drafting, files: Mapping[str, File] | None = None) -> None:
    """Replace a bundle's manifest, atomically, by one that says how tokens are drafted; no other file changes.

    Args:
        bundle: the bundle.
        drafting: how its tokens are drafted.
        files: the files that the manifest lists from now on; None for those that it lists.

    Raises:
        DynexportError: when the bundle was changed since it was opened, or its manifest cannot be written.
    """
    with bundle.unchanged():
        update = {"drafting": drafting, "files": bundle.manifest.files if files is None else files}
        content = bundle.manifest.model_copy(update=update).model_dump_json(indent=1) + "\n"
    _write(bundle.path / MANIFEST, content.encode())


def store_ngrams(bundle: Bundle, learned: Learned, tokens: int) -> Ngrams:
    """Store a table in a bundle, in place of the one that it has; how many tokens are drafted is then as by default.

    The file is named by its content, and written before the manifest that lists it: the old manifest has the old table,
    the new one the new.

    Args:
        bundle: the bundle; open it again afterwards.
        learned: the table.
        tokens: number of tokens of the text that it was learned from.

    Raises:
        DynexportError: when the bundle was changed since it was opened, or a file cannot be written.
    """
    content = learned.table.content()
    sha256 = hashlib.sha256(content).hexdigest()
    name = _NGRAM_FILES.replace("*", sha256[:16])
    ngrams = Ngrams(file=name, entries=len(learned.table), tokens=tokens, acceptance=learned.acceptance)
    before = bundle.manifest.ngrams
    files = {other: file for other, file in bundle.manifest.files.items() if not before or other != before.file}
    if name not in bundle.manifest.files:
        _write(bundle.path / name, content)
    files[name] = File(sha256=sha256, bytes=len(content))
    store_drafting(bundle, Drafting(most=Speculation().most, ngrams=ngrams), files)
    for other in bundle.path.glob(_NGRAM_FILES):
        if other.name not in files:
            other.unlink(missing_ok=True)
    return ngrams


def _write(path: Path, content: bytes) -> None:
    try:
        write_file(path, content)
    except (OSError, ValueError) as error:
        raise DynexportError(f"{path}: expected a file to write, found: {error}") from error


__all__ = ["store_drafting", "store_ngrams"]
