"""What a measurement compares: depths of a bundle, and windows of a text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_list, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth


def compared_depths(bundle: Bundle, wanted: str | float | None) -> tuple[Depth, ...]:
    """Return full depth, and the others to compare with it: those that run fewer layers.

    Args:
        wanted: a ratio or name as for ``Bundle.depth``; None for all that the bundle declares.

    Raises:
        DynexportError: when the bundle does not declare it.
    """
    full = bundle.manifest.full
    others = bundle.manifest.depths if wanted is None else (bundle.depth(wanted),)
    return (full, *(depth for depth in others if (depth.keep, depth.prompt) != (full.keep, full.prompt)))


def rows_together(bundle: Bundle, wanted: int) -> int:
    """Return how many windows run together: as many as wanted, but no more than engines are built for.

    Raises:
        DynexportError: when less than one is wanted.
    """
    wanted = checked_count("batch", wanted)
    return min(wanted, bundle.manifest.limits.rows or wanted)


def text_windows(ids: Iterable[int], window: int, max_tokens: int, vocabulary: int) -> np.ndarray:
    """Cut the beginning of a text into windows.

    Args:
        ids: the text.
        window: tokens per row, at least 1.
        max_tokens: use at most so many tokens of the text.
        vocabulary: token ids that the model has.

    Returns:
        int64 [windows, window], at least one.

    Raises:
        DynexportError: when the text is shorter than a window, or has tokens that the model lacks.
    """
    if not is_integer(max_tokens) or max_tokens < window:
        raise DynexportError(f"max_tokens: expected at least one window of {window}, found {shown(max_tokens)}")
    listed = checked_list("text", ids, "token ids")
    count = min(len(listed), max_tokens) // window
    if count < 1:
        raise DynexportError(f"text: expected at least one window of {window} tokens, found {len(listed)} tokens")
    return checked_ids("text", listed[: count * window], vocabulary).reshape(count, window)


__all__ = ["compared_depths", "rows_together", "text_windows"]
