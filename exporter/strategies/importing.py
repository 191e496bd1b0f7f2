"""Find importers of checkpoints that other routing code wrote; strategies declare them."""

from __future__ import annotations

from pathlib import Path

from dynexport.exporter.checkpoint import Checkpoint, Importer, open_checkpoint
from dynexport.exporter.strategies import strategies
from dynexport.runtime.bundle.errors import DynexportError


def importers() -> dict[str, Importer]:
    """Return every importer by its name on the command line."""
    return {importer.name: importer for strategy in strategies().values() for importer in strategy.importers}


def find_importer(name: str | None) -> Importer | None:
    """Return the importer of a name, None for None. Raises DynexportError for an unknown name."""
    known = importers()
    if name is not None and not (isinstance(name, str) and name in known):
        raise DynexportError(f"import: expected {' or '.join(known)}, found {name!r:.80}")
    return None if name is None else known[name]


def open_imported(
    model: str | Path,
    importer: str | None = None,
    *,
    tokenizer: Path | None = None,
    adapter: str | Path | None = None,
) -> Checkpoint:
    """Open a model by the importer of a name, else by the one that recognises it, else as it is.

    Args:
        model: as for ``open_checkpoint``.
        importer: an importer's name; None to recognise the model by its config and tensors.
        tokenizer: as for ``open_checkpoint``.
        adapter: as for ``open_checkpoint``.

    Raises:
        DynexportError: as ``open_checkpoint`` and ``find_importer``.
    """
    return open_checkpoint(
        model,
        tokenizer=tokenizer,
        importer=find_importer(importer),
        importers=tuple(importers().values()),
        adapter=adapter,
    )


__all__ = ["find_importer", "importers", "open_imported"]
