"""Find thresholds of routed layers such that a target share of a text's tokens runs (docs/calibration.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from dynexport.exporter.strategies.calibration import Calibration, CalibrationOptions, LayerCalibration, Rule
from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_kind, checked_share, is_integer
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.decisions import Decisions
from dynexport.runtime.execution.executor import Executor
from dynexport.runtime.measure.compared import rows_together, text_windows

Array = np.ndarray
_COMPARISONS = {">": np.greater, ">=": np.greater_equal}


def calibrate(bundle: Bundle, ids: Sequence[int], options: CalibrationOptions) -> Calibration:
    """Find a threshold for every routed layer, in ascending order.

    Every token is decided causally, like a generated one. An earlier layer's threshold changes the input of later
    layers, so the text runs once per routed layer, with the decisions of earlier layers forced to their new thresholds.
    The first pass uses the bundle's own thresholds in every layer.

    Args:
        bundle: an opened Mixture-of-Depths bundle.
        ids: the text's token ids.
        options: the options of the calibration.

    Raises:
        DynexportError: for a bundle without thresholds, a text that is shorter than a window or has unknown tokens, or
            an option out of range.
    """
    contract = _calibratable(bundle)
    target = contract.capacity if options.target_rate is None else options.target_rate
    target = checked_share("target_rate", target)
    batch = rows_together(bundle, options.batch)
    _check_window(bundle, options.window)
    windows = text_windows(ids, options.window, options.max_tokens, bundle.manifest.model.vocab_size)
    text = _Text(bundle, contract, windows, batch, options)
    forced = np.full((len(contract.routed_layers), *windows.shape), -1, np.int64)
    first = text.run(forced)
    forced[1:] = 0  # later layers do not affect the one being calibrated
    layers = []
    for place, layer in enumerate(contract.routed_layers):
        if place:
            forced[place] = -1
        decided = text.run(forced) if place else first
        probability = decided.probabilities(contract, place)
        threshold = threshold_for(probability, target, contract.decision.comparison)
        forced[place] = runs = _COMPARISONS[contract.decision.comparison](probability, np.float32(threshold))
        layers.append(
            LayerCalibration(
                layer=layer,
                now=_rule(contract.threshold(layer), first.ran[place], top_k(contract, first.scores[place])),
                calibrated=_rule(threshold, runs, top_k(contract, decided.scores[place])),
            )
        )
    return Calibration(
        target_rate=target,
        tokens=windows.size,
        window=options.window,
        k=top_k_count(contract, options.window),
        layers=layers,
    )


def threshold_for(probabilities: Array, rate: float, comparison: str) -> float:
    """Return the threshold whose share of passing tokens is nearest to ``rate``.

    It lies halfway between the lowest probability that passes and the highest that does not. If all pass, it is 0 or
    below. At least one token passes. Tokens with equal probabilities pass together.

    Args:
        probabilities: float32, in [0, 1].
        rate: the target share of passing tokens, in (0, 1].
        comparison: ">" or ">=".

    Returns:
        A float32 number as its shortest decimal.
    """
    passes = _COMPARISONS[comparison]
    values, counts = np.unique(probabilities, return_counts=True)
    passing = counts[::-1].cumsum()
    place = len(values) - 1 - int(np.abs(passing - rate * probabilities.size).argmin())
    last = values[place]
    below = values[place - 1] if place else np.float32(-1)
    middle = np.float32((float(last) + float(below)) / 2)
    if not passes(last, middle):  # the two are adjacent float32 numbers
        middle = below
    elif passes(below, middle):
        middle = last
    return float(str(middle))


def top_k_count(contract: Mod, tokens: int) -> int:
    """Return k = max(1, rounding(capacity * tokens)), computed with the capacity's exact decimal value."""
    share = Fraction(str(contract.capacity)) * tokens
    return max(1, math.floor(share) if contract.rounding == "floor" else math.ceil(share))


def top_k(contract: Mod, scores: Array) -> Array:
    """Return the tokens of each window that top-k chooses; the lower position wins ties.

    Args:
        contract: the bundle's contract, for its capacity.
        scores: float32 [windows, window].

    Returns:
        bool [windows, window].
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, : top_k_count(contract, scores.shape[1])]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


class _Decided:
    """The decisions of the routed layers for a text.

    Attributes:
        ran: bool [R, windows, window].
        scores: float32 [R, windows, window].
        margins: float32 [R, windows, window].
    """

    def __init__(self, rows: Sequence[Decisions]) -> None:
        self.ran = np.stack([row.choices == 1 for row in rows], axis=1)
        self.scores = np.stack([row.scores for row in rows], axis=1)
        self.margins = np.stack([row.margins for row in rows], axis=1)

    def probabilities(self, contract: Mod, place: int) -> Array:
        """Return the probabilities of a layer without forced or overflowing tokens, float32 [windows, window]."""
        if contract.decision.rule == "router":
            with np.errstate(over="ignore"):
                return np.asarray(1 / (1 + np.exp(-self.scores[place])), np.float32)
        # The graph does not output a predictor's logit; its probability follows from the margin and the decision.
        threshold = np.float32(contract.threshold(contract.routed_layers[place])).astype(np.float64)
        margins = np.where(self.ran[place], self.margins[place], -self.margins[place])
        return np.asarray(threshold + margins, np.float32)


class _Text:
    """Runs the windows of a text, once per pass.

    Args:
        bundle: the bundle to run.
        contract: the bundle's contract.
        windows: token ids, int64 [windows, window].
        batch: windows per batch.
        options: the options of the calibration.
    """

    def __init__(self, bundle: Bundle, contract: Mod, windows: Array, batch: int, options: CalibrationOptions) -> None:
        self._windows, self._contract, self._batch, self._progress = windows, contract, batch, options.progress
        self._executor = Executor(bundle, options.threads)
        self._done = 0

    def run(self, forced: Array) -> _Decided:
        """Run all windows with forced decisions, int64 [R, windows, window]; -1 leaves one to the router."""
        decided: list[Decisions] = []
        for start in range(0, len(self._windows), self._batch):
            rows = self._windows[start : start + self._batch]
            decided += self._run_rows(rows, forced[:, start : start + self._batch])
            self._done += len(rows)
            if self._progress is not None:
                self._progress(self._done, len(self._windows) * len(self._contract.routed_layers))
        return _Decided(decided)

    def _run_rows(self, rows: Array, forced: Array) -> list[Decisions]:
        cache = self._executor.full_cache(*rows.shape, record=True)
        if self._contract.prefill == "causal":
            self._executor.prefill(cache, list(rows), forced=list(forced.swapaxes(0, 1)))
        else:  # in a prompt, top-k would decide instead of the causal rule
            for position in range(rows.shape[1]):
                self._executor.step(
                    cache, rows[:, position], self._executor.manifest.full, forced=forced[:, :, position]
                )
        assert cache.logs is not None
        return [self._executor.reader.joined(log) for log in cache.logs]


def _calibratable(bundle: Bundle) -> Mod:
    """Return the contract of a bundle. Raises DynexportError for one whose thresholds cannot be calibrated."""
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    contract = bundle.manifest.contract
    assert isinstance(contract, Mod)
    if contract.decision.rule == "always":
        raise DynexportError(
            f"{bundle.path}: decision.rule: expected router or predictor, found always, which has no threshold; "
            "convert again with --set decision.rule=router"
        )
    if contract.decisions_per_layer > 1:
        raise DynexportError(
            f"{bundle.path}: target: expected one decision about every token in a routed layer to calibrate, found "
            f"{contract.target}, whose two decisions share the layer's threshold, so that one share of tokens does not "
            "give it; set thresholds with convert --set"
        )
    if contract.level == "sequence":
        raise DynexportError(
            f"{bundle.path}: level: expected token to calibrate, found sequence, whose decisions are about whole first "
            "prompts: windows of a text are none; set thresholds with convert --set"
        )
    # Far from 0..1, float32 margins are too coarse to distinguish probabilities.
    for layer in contract.routed_layers if contract.decision.rule == "predictor" else ():
        if not -1 <= contract.threshold(layer) <= 2:
            raise DynexportError(
                f"{bundle.path}: layer {layer}: expected a predictor's threshold in -1..2, found "
                f"{contract.threshold(layer):g}; convert again with --set decision.threshold=0.5"
            )
    return contract


def _check_window(bundle: Bundle, window: int) -> None:
    most = min((cache.most for cache in bundle.manifest.caches if cache.most is not None), default=math.inf)
    limit = min(bundle.manifest.model.max_length, most)
    if is_integer(window) and window > most:
        raise DynexportError(
            f"window: expected at most {limit} tokens, the capacity of a routed layer's cache, found {window}; "
            "choose a smaller --window, or convert with a larger cache.capacity"
        )
    checked_count("window", window, 1, int(limit))


def _rule(threshold: float, runs: Array, top: Array) -> Rule:
    return Rule(threshold=threshold, rate=float(runs.mean()), flips=float((runs != top).mean()))


__all__ = ["calibrate", "threshold_for", "top_k", "top_k_count"]
