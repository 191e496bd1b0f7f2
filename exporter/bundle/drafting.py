"""Store in a bundle's manifest how its tokens are drafted."""

from __future__ import annotations

from dynexport.runtime.bundle.atomic import write_file
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.drafting import Drafting
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import MANIFEST


def store_drafting(bundle: Bundle, drafting: Drafting) -> None:
    """Replace a bundle's manifest, atomically, by one that says how tokens are drafted; no other file changes.

    Raises:
        DynexportError: when the bundle was changed since it was opened, or its manifest cannot be written.
    """
    path = bundle.path / MANIFEST
    with bundle.unchanged():
        content = bundle.manifest.model_copy(update={"drafting": drafting}).model_dump_json(indent=1) + "\n"
    try:
        write_file(path, content.encode())
    except (OSError, ValueError) as error:
        raise DynexportError(f"{path}: expected a file to write, found: {error}") from error


__all__ = ["store_drafting"]
