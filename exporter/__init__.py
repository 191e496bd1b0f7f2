"""The exporter: a checkpoint to a routed graph, a bundle, and a verdict on its parity with PyTorch."""

from typing import Any

__all__ = ["ConvertOptions", "convert", "verify"]


def __getattr__(name: str) -> Any:
    # Only when asked for: the graph builder is a second of imports that most commands do without.
    if name == "convert":
        from dynexport.exporter.bundle.conversion import convert

        return convert
    if name == "ConvertOptions":
        from dynexport.exporter.bundle.options import ConvertOptions

        return ConvertOptions
    if name == "verify":
        from dynexport.exporter.parity import verify

        return verify
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
