"""A bundle on disk: its contract, its manifest, its files. The rest of the runtime builds on this package."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["Bundle", "DynexportError", "Manifest"]

# Imported on first use: code that needs only the error class does not load pydantic.
__getattr__ = lazily(
    __name__,
    {
        "Bundle": "dynexport.runtime.bundle.bundle",
        "DynexportError": "dynexport.runtime.bundle.errors",
        "Manifest": "dynexport.runtime.bundle.manifest",
    },
)
