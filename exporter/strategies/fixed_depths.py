"""Shared code of strategies whose depths are fixed sets of layers, the same for every token."""

from __future__ import annotations

from collections.abc import Sequence

from dynexport.runtime.bundle.manifest import Depth


def skipped_together(layers: Sequence[int], depths: Sequence[Depth]) -> tuple[tuple[int, ...], ...]:
    """Group layers that are in the same depths for prompts and decoding, whose caches have equal lengths."""
    groups: dict[tuple[bool, ...], list[int]] = {}
    for layer in layers:
        key = tuple(layer in run for depth in depths for run in (depth.keep, depth.prompt))
        groups.setdefault(key, []).append(layer)
    return tuple(tuple(group) for group in groups.values())


__all__ = ["skipped_together"]
