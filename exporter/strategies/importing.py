"""Find importers of checkpoints that other routing code wrote; strategies declare them."""

from __future__ import annotations

from dynexport.exporter.checkpoint import Importer
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


__all__ = ["find_importer", "importers"]
