"""dynexport: deploy language models that do not run every layer for every token."""

import os
from importlib import import_module
from typing import Any

# ONNX Runtime 1.29 and newer report their use to their maker unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "Bundle",
    "DynexportError",
    "Generation",
    "Model",
    "Piece",
    "Sampling",
    "__version__",
    "convert",
    "load",
    "verify",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: reading a manifest needs no engine, and running a bundle needs no exporter.
    if name == "__version__":
        from importlib.metadata import version

        return version("dynexport")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    room = "dynexport.exporter" if name in ("convert", "verify") else "dynexport.runtime"
    return getattr(import_module(room), name)
