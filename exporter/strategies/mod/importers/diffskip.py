"""DiffSkip (ACL Findings 2025): refused by name, because what its routers compute could not be read anywhere."""

from __future__ import annotations

from pathlib import PurePath

from dynexport.exporter.checkpoint import Checkpoint, Importer
from dynexport.runtime.bundle.errors import DynexportError

_FIELDS = ("model_type", "architectures", "auto_map", "_name_or_path")


def _recognises(stored: Checkpoint) -> bool:
    """Return whether a name says DiffSkip: its layout may be FlexiDepth's, whose authors are the same."""
    named = [*(str(stored.config.get(field)) for field in _FIELDS), PurePath(stored.source).name]
    return any("diffskip" in name.lower() for name in named) and any("router" in name for name in stored.names)


def _read(stored: Checkpoint) -> Checkpoint:
    raise DynexportError(
        f"{stored.source}: import diffskip: expected a method whose formula is public, found DiffSkip, of which only "
        "the signal is described (attention's input minus its output, for the MLP); it cannot be imported, and to "
        "convert it as another method would give another model"
    )


DIFFSKIP = Importer("diffskip", _read, _recognises)

__all__ = ["DIFFSKIP"]
