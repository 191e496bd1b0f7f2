"""Choose the library of dynexport's CPU operators for a bundle whose graphs call them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from functools import cache
from pathlib import Path

from dynexport.plugins.cpu_library import OPERATORS, VARIABLE, CpuLibrary, find_library
from dynexport.runtime.bundle.errors import DynexportError

_log = logging.getLogger("dynexport")


def library_for(operators: Collection[str]) -> Path | None:
    """Return the library for graphs that call these operators; None where they need none, or there is none.

    Without a library the graphs run the operators' bodies, and a warning is logged once.

    Raises:
        DynexportError: when the environment names a library that cannot be used.
    """
    if not set(operators) & set(OPERATORS):
        return None
    found = find_library()
    if isinstance(found, CpuLibrary):
        return found.path
    if os.environ.get(VARIABLE):
        raise DynexportError(found)
    _say_once(found)
    return None


@cache
def _say_once(reason: str) -> None:
    _log.warning(
        "the library of CPU operators: %s; the graphs run without it, slower and with float32 weights in memory "
        "(docs/plugins.md)",
        reason,
    )


__all__ = ["library_for"]
