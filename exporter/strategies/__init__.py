"""The routing strategies: every module of this package that defines ``STRATEGY`` is found by search."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

from dynexport.exporter.families import read_architecture
from dynexport.exporter.strategies.strategy import Strategy

__all__ = ["Strategy", "declared_contract", "strategies"]


@cache
def strategies() -> dict[str, Strategy[Any, Any]]:
    """Return every strategy by its name on the command line and in contracts."""
    found = {}
    for module in pkgutil.iter_modules(__path__):
        strategy = getattr(importlib.import_module(f"{__name__}.{module.name}"), "STRATEGY", None)
        if isinstance(strategy, Strategy):
            found[strategy.name] = strategy
    return dict(sorted(found.items()))


def declared_contract(config: Mapping[str, Any]) -> Any:
    """Return the unchecked fields of a config's routing contract: ``dynexport``, else what its family's fields say.

    Returns:
        None for a config that declares none.

    Raises:
        DynexportError: for fields of the family that are not supported.
    """
    if config.get("dynexport") is not None:
        return config["dynexport"]
    architecture = read_architecture(config)
    found = (strategy.declares(architecture) for strategy in strategies().values())
    return next((fields for fields in found if fields is not None), None)
