"""Turn a checkpoint into a routed graph and a bundle, and check its parity with PyTorch."""

from dynexport.runtime.bundle.lazy import lazily

__all__ = ["ConvertOptions", "convert", "verify"]

# Imported when asked for: the graph builder takes a second, which most commands do without.
__getattr__ = lazily(
    __name__,
    {
        "ConvertOptions": "dynexport.exporter.bundle.options",
        "convert": "dynexport.exporter.bundle.conversion",
        "verify": "dynexport.exporter.parity.verification",
    },
)
