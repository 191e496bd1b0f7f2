"""Inputs of a comparison: depths of a bundle and windows of a text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_ids, checked_list, is_integer, shown
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth


def compared_depths(bundle: Bundle, wanted: str | float | None) -> tuple[Depth, ...]:
    """Return full depth and the depths to compare with it, which run fewer layers.

    Args:
        wanted: a ratio or name as for ``Bundle.depth``; None for every depth of the bundle.

    Raises:
        DynexportError: the bundle does not declare the depth.
    """
    full = bundle.manifest.full
    others = bundle.manifest.depths if wanted is None else (bundle.depth(wanted),)
    return (full, *(depth for depth in others if (depth.keep, depth.prompt) != (full.keep, full.prompt)))


def rows_together(bundle: Bundle, wanted: int) -> int:
    """Return the number of windows per batch: ``wanted``, but at most the rows that the engines accept.

    Raises:
        DynexportError: ``wanted`` is less than 1.
    """
    wanted = checked_count("batch", wanted)
    return min(wanted, bundle.manifest.limits.rows or wanted)


def text_windows(ids: Iterable[int], window: int, max_tokens: int, vocabulary: int) -> np.ndarray:
    """Cut the beginning of a text into windows.

    Args:
        ids: token ids of the text.
        window: tokens per window, at least 1.
        max_tokens: maximum number of tokens to use, from the text's beginning.
        vocabulary: number of token ids that the model has.

    Returns:
        int64 [windows, window], at least one.

    Raises:
        DynexportError: the text is shorter than a window, or has token ids that the model lacks.
    """
    if not is_integer(max_tokens) or max_tokens < window:
        raise DynexportError(f"max_tokens: expected at least one window of {window}, found {shown(max_tokens)}")
    listed = checked_list("text", ids, "token ids")
    count = min(len(listed), max_tokens) // window
    if count < 1:
        raise DynexportError(f"text: expected at least one window of {window} tokens, found {len(listed)} tokens")
    return checked_ids("text", listed[: count * window], vocabulary).reshape(count, window)


__all__ = ["compared_depths", "rows_together", "text_windows"]
