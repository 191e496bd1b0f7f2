"""The routing strategies: every module of this package that defines ``STRATEGY`` is found by search."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any

from dynexport.exporter.strategies.strategy import Strategy

__all__ = ["Strategy", "strategies"]


@cache
def strategies() -> dict[str, Strategy[Any, Any]]:
    """Return every strategy by its name on the command line and in contracts."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        strategy = getattr(importlib.import_module(f"{__name__}.{module.name}"), "STRATEGY", None)
        if isinstance(strategy, Strategy):
            found[strategy.name] = strategy
    return dict(sorted(found.items()))
