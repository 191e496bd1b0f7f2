"""Measure which way of drafting a bundle's tokens is the fastest on a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dynexport.runtime.bundle.drafting import Drafting
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.bundle.manifest import Depth
from dynexport.runtime.generation.model import Model
from dynexport.runtime.generation.speculation import Speculation, runs_any_layers
from dynexport.runtime.measure.compared import text_windows
from dynexport.runtime.measure.draft_layers import DraftLayers
from dynexport.runtime.measure.speculated import DraftedWork, Speculated, measure_drafts

Array = np.ndarray
# Most drafts of a step that are tried.
_TRIED = (2, 4, 8, 16)
_PROMPTS, _NEW = 4, 64


@dataclass(frozen=True)
class DraftChoice:
    """The result of a choice: what to store in the manifest, and all that was measured, the best first."""

    drafting: Drafting
    measured: tuple[Speculated, ...]


def choose_drafting(
    model: Model,
    ids: Sequence[int],
    *,
    window: int = 256,
    repeats: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DraftChoice:
    """Decode continuations of a text with every way of drafting, and choose the fastest.

    Tried are prompt lookup (with the bundle's n-gram table, if it has one), every depth of fewer layers and, where one
    graph runs any layers, those that a search finds; then the fastest with up to 2, 4, 8 and 16 drafts a step. Where
    none is faster than decoding without drafts, prompt lookup is chosen, which costs nothing where it finds nothing.

    Args:
        model: the model.
        ids: the text's token ids; up to four windows of it are prompts.
        window: tokens of a prompt.
        repeats: number of repetitions of the last measurement.
        progress: called after every part of the work.

    Raises:
        DynexportError: for a text that is shorter than a window or has unknown tokens, a window that does not fit the
            context with 64 new tokens, or a model that cannot be speculated with.
    """
    manifest = model.bundle.manifest
    if window + _NEW > manifest.model.max_length:
        raise DynexportError(
            f"window: expected at most {manifest.model.max_length - _NEW} tokens to fit the context with {_NEW} new "
            f"ones, found {window}"
        )
    prompts = text_windows(ids, window, _PROMPTS * window, manifest.model.vocab_size)
    work = DraftedWork([[prompt] for prompt in prompts], _NEW, manifest.full, 1)
    ways = [Speculation(), *(Speculation(depth=depth) for depth in _depths(model, prompts, progress))]
    first = _fastest_first(measure_drafts(model, work, ways, progress=progress), ways)
    tried = [replace(first[0][1], most=most) for most in _TRIED]
    last = _fastest_first(measure_drafts(model, replace(work, repeats=repeats), tried, progress=progress), tried)
    measured, chosen = last[0]
    if measured.gain <= 1:
        chosen = Speculation()
    keep = None if chosen.depth is None else chosen.depth.keep
    drafting = Drafting(most=chosen.most, keep=keep, gain=measured.gain, ngrams=manifest.ngrams)
    return DraftChoice(drafting, tuple(each for each, _ in (*last, *first[1:])))


def _fastest_first(measured: Sequence[Speculated], ways: Sequence[Speculation]) -> list[tuple[Speculated, Speculation]]:
    return sorted(zip(measured, ways, strict=True), key=lambda each: -each[0].gain)


def _depths(model: Model, prompts: Array, progress: Callable[[int, int], None]) -> list[Depth]:
    """Return the depths to try: those that the bundle declares, and layers that a search finds."""
    manifest = model.bundle.manifest
    found = [depth for depth in manifest.depths if len(depth.keep) < manifest.model.layers]
    if not runs_any_layers(manifest):
        return found
    answers = [each.ids for each in model.generate(list(prompts), max_new_tokens=_NEW, depth="full")]
    if min(map(len, answers)) > 1:
        searched, _ = DraftLayers(model.executor, list(prompts), answers).search(progress)
        found += [searched] if searched.keep not in [depth.keep for depth in found] else []
    return found


__all__ = ["DraftChoice", "choose_drafting"]
