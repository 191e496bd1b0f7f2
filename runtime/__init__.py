"""Run bundles. The runtime needs neither torch nor the exporter."""

from typing import Any

__all__ = ["Bundle", "DynexportError", "Generation", "Generator", "Piece", "Sampling"]

_HOMES = {
    "Bundle": "dynexport.runtime.bundle.bundle",
    "DynexportError": "dynexport.runtime.bundle.errors",
    "Generation": "dynexport.runtime.generation.generator",
    "Generator": "dynexport.runtime.generation.generator",
    "Piece": "dynexport.runtime.generation.generator",
    "Sampling": "dynexport.runtime.generation.sampling",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: reading a manifest needs no engine.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
