"""Run bundles. The runtime needs neither torch nor the exporter."""

from typing import Any

__all__ = ["Bundle", "Conversation", "DynexportError", "Generation", "Model", "Piece", "Sampling", "load"]

_HOMES = {
    "Bundle": "dynexport.runtime.bundle.bundle",
    "DynexportError": "dynexport.runtime.bundle.errors",
    "Conversation": "dynexport.runtime.generation.conversation",
    "Generation": "dynexport.runtime.generation.request",
    "Model": "dynexport.runtime.generation.model",
    "Piece": "dynexport.runtime.generation.request",
    "load": "dynexport.runtime.generation.model",
    "Sampling": "dynexport.runtime.generation.sampling",
}


def __getattr__(name: str) -> Any:
    # Only when asked for: reading a manifest needs no engine.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
