"""A bundle on disk: its contract, its manifest, its files. Everything else in the runtime stands on this."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["Bundle", "DynexportError", "Manifest"]

# Imported when asked for: what names an error needs no manifest.
__getattr__ = lazily(
    __name__,
    {
        "Bundle": "dynexport.runtime.bundle.bundle",
        "DynexportError": "dynexport.runtime.bundle.errors",
        "Manifest": "dynexport.runtime.bundle.manifest",
    },
)
