"""Which bundles compute with other numbers than their checkpoint: rounded weights, keys or values."""

from __future__ import annotations

from dynexport.exporter.reference.dequantised import is_quantised
from dynexport.plugins.attention import NAME
from dynexport.runtime.bundle.manifest import CachePart, Manifest


def has_int8_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored as int8."""
    return any(part.dtype == "int8" for part in _stored(manifest))


def has_half_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored as float16 between layers that compute in float32."""
    half = any(part.dtype == "float16" for part in _stored(manifest))
    return half and manifest.target == "onnxruntime"


def _stored(manifest: Manifest) -> list[CachePart]:
    """Return the keys of every cache that is stored: layers without attention have none."""
    return [cache.parts["key"] for cache in manifest.caches if cache.parts]


def has_rounded_caches(manifest: Manifest) -> bool:
    """Return whether keys and values are stored in fewer bits than they are computed in."""
    return has_int8_caches(manifest) or has_half_caches(manifest)


def is_rounded(manifest: Manifest) -> bool:
    """Return whether a bundle computes with other numbers than its checkpoint: rounded weights, keys or values."""
    return is_quantised(manifest) or has_rounded_caches(manifest)


def attends_to_stored(manifest: Manifest) -> bool:
    """Return whether all tokens attend to stored keys and values, those of their own call included.

    dynexport's operator works so. Around ONNX Runtime's, tokens of one call attend to each other's before these are
    rounded.
    """
    return NAME in manifest.operators


__all__ = ["attends_to_stored", "has_half_caches", "has_int8_caches", "has_rounded_caches", "is_rounded"]
