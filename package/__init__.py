"""dynexport: deploy language models that do not run every layer for every token."""

from importlib.metadata import version

__all__ = ["__version__"]

__version__ = version("dynexport")
