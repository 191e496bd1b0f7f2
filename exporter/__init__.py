"""Turn a checkpoint into a routed graph and a bundle, and check its parity with PyTorch."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["ConvertOptions", "convert", "verify"]

# Imported on first use: the graph builder takes a second to import, and most commands do not need it.
__getattr__ = lazily(
    __name__,
    {
        "ConvertOptions": "dynexport.exporter.bundle.options",
        "convert": "dynexport.exporter.bundle.conversion",
        "verify": "dynexport.exporter.parity.verification",
    },
)
