"""dynexport: deploy language models that do not run every layer for every token."""

from typing import Any

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version  # only when asked for: it costs a tenth of what a bundle's import takes

    return version("dynexport")
