"""Refuse, by name, the contracts that no graph can be written for."""

from __future__ import annotations

from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError


def check_supported(contract: Mod) -> None:
    """Raise DynexportError for a field that graphs do not implement."""
    for name in ("target", "skipped_kv", "router", "skip_branch", "affine", "keep_first", "level"):
        found = getattr(contract, name)
        if found != Mod.model_fields[name].default:
            raise DynexportError(f"mod: {name}: expected the field's default, as graphs have no others, found {found}")


__all__ = ["check_supported"]
