"""Thresholds of routed layers, such that a wanted share of a text's tokens runs (docs/calibration.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from pydantic import BaseModel

from dynexport.runtime.bundle.bundle import Bundle
from dynexport.runtime.bundle.checks import checked_count, checked_kind, checked_share, is_integer
from dynexport.runtime.bundle.contract import Mod
from dynexport.runtime.bundle.errors import DynexportError
from dynexport.runtime.execution.decoder import Decoder
from dynexport.runtime.execution.routes import RowLog
from dynexport.runtime.measure.evaluate import rows_together, text_windows

Array = np.ndarray
_COMPARISONS = {">": np.greater, ">=": np.greater_equal}


class Rule(BaseModel):
    """What a threshold does to a text.

    Attributes:
        rate: share of the tokens that run.
        flips: share of the tokens on which top-k, within each window, decides otherwise.
    """

    threshold: float
    rate: float
    flips: float


class LayerCalibration(BaseModel):
    """One routed layer: its rule as it is, when all layers have theirs; and calibrated, when all have that."""

    layer: int
    now: Rule
    calibrated: Rule


class Calibration(BaseModel):
    """Thresholds that meet ``target_rate`` on ``tokens`` tokens, in windows of ``window``; top-k takes k of each."""

    target_rate: float
    tokens: int
    window: int
    k: int
    layers: list[LayerCalibration]

    @property
    def thresholds(self) -> dict[str, float]:
        """As the contract's ``thresholds`` stand in JSON: layer -> threshold."""
        return {str(layer.layer): layer.calibrated.threshold for layer in self.layers}


def calibrate(
    bundle: Bundle,
    ids: Sequence[int],
    *,
    target_rate: float | None = None,
    window: int = 256,
    max_tokens: int = 4096,
    batch: int = 8,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Find a threshold for every routed layer, in ascending order.

    Every token is decided causally, as a generated one is. An earlier layer's threshold changes what later layers see,
    so the text runs once for every routed layer, with the decisions of the layers before it forced to what their new
    thresholds say. The first of these passes leaves every layer to the bundle's own rule.

    Args:
        ids: the text.
        target_rate: share of the tokens that shall run, in (0, 1]; None takes the contract's capacity.
        window: tokens of the pieces that the text is cut into; each is a sequence of its own.
        max_tokens: use at most so many tokens of the text.
        batch: windows that run together, at most as many as the bundle takes; it does not change the result.
        progress: called with windows done and in all, every pass counted.

    Raises:
        DynexportError: when the bundle has no threshold to find, the text is shorter than a window or has tokens that
            the model lacks, or a size is out of range.
    """
    checked_kind("bundle", bundle, Bundle, "an opened Bundle (Bundle.open)")
    contract = _calibratable(bundle)
    target = contract.capacity if target_rate is None else target_rate
    target = checked_share("target_rate", target)
    batch = rows_together(bundle, batch)
    _check_window(bundle, window)
    windows = text_windows(ids, window, max_tokens, bundle.manifest.model.vocab_size)
    text = _Text(bundle, contract, windows, batch, threads, progress)
    forced = np.full((len(contract.routed_layers), *text.windows.shape), -1, np.int64)
    first = text.run(forced)
    forced[1:] = 0  # layers that are not looked at yet need not run
    layers = []
    for place, layer in enumerate(contract.routed_layers):
        if place:
            forced[place] = -1
        routes = text.run(forced) if place else first
        probability = routes.probabilities(contract, place)
        threshold = threshold_for(probability, target, contract.decision.comparison)
        forced[place] = runs = _COMPARISONS[contract.decision.comparison](probability, np.float32(threshold))
        layers.append(
            LayerCalibration(
                layer=layer,
                now=_rule(contract.threshold(layer), first.ran[place], top_k(contract, first.scores[place])),
                calibrated=_rule(threshold, runs, top_k(contract, routes.scores[place])),
            )
        )
    return Calibration(
        target_rate=target, tokens=text.windows.size, window=window, k=top_k_count(contract, window), layers=layers
    )


def threshold_for(probabilities: Array, rate: float, comparison: str) -> float:
    """The threshold that lets a share of the tokens run, as nearly as equal probabilities allow.

    It lies in the middle between the last probability that passes and the first that does not. Where all pass it is
    0 or below, so that any other would pass, too. At least one token passes.

    Args:
        probabilities: float32, in [0, 1].
        comparison: ">" or ">=".

    Returns:
        A float32 number as the shortest decimal that means it.
    """
    passes = _COMPARISONS[comparison]
    values, counts = np.unique(probabilities, return_counts=True)
    passing = counts[::-1].cumsum()
    place = len(values) - 1 - int(np.abs(passing - rate * probabilities.size).argmin())
    last = values[place]
    below = values[place - 1] if place else np.float32(-1)
    middle = np.float32((float(last) + float(below)) / 2)
    if not passes(last, middle):  # neighbours among the float32 numbers
        middle = below
    elif passes(below, middle):
        middle = last
    return float(str(middle))


def top_k_count(contract: Mod, tokens: int) -> int:
    """k = max(1, rounding(capacity * tokens)), of the decimal number that was written."""
    share = Fraction(str(contract.capacity)) * tokens
    return max(1, math.floor(share) if contract.rounding == "floor" else math.ceil(share))


def top_k(contract: Mod, scores: Array) -> Array:
    """Which tokens of each window top-k chooses, lower position first on ties.

    Args:
        scores: float32 [windows, window].

    Returns:
        bool [windows, window].
    """
    best = np.argsort(-scores, axis=1, kind="stable")[:, : top_k_count(contract, scores.shape[1])]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


class _Routes:
    """What became of a text's tokens in the routed layers.

    Attributes:
        ran: bool [R, windows, window].
        scores, margins: float32 [R, windows, window].
    """

    def __init__(self, logs: Sequence[RowLog], routed: Sequence[int]) -> None:
        self.ran = np.stack([np.concatenate(log.ran, axis=1)[list(routed)] for log in logs], axis=1)
        self.scores = np.stack([np.concatenate(log.scores, axis=1) for log in logs], axis=1)
        self.margins = np.stack([np.concatenate(log.margins, axis=1) for log in logs], axis=1)

    def probabilities(self, contract: Mod, place: int) -> Array:
        """float32 [windows, window] of a routed layer that has decided for itself, with room for all."""
        if contract.decision.rule == "router":
            with np.errstate(over="ignore"):
                return np.asarray(1 / (1 + np.exp(-self.scores[place])), np.float32)
        # A predictor's logit is no output, but its distance to the threshold is, and on which side it lies.
        threshold = np.float32(contract.threshold(contract.routed_layers[place])).astype(np.float64)
        margins = np.where(self.ran[place], self.margins[place], -self.margins[place])
        return np.asarray(threshold + margins, np.float32)


class _Text:
    """A text in windows, to be run again and again.

    Args:
        windows: int64 [windows, window].
        batch, threads, progress: as for ``calibrate``.
    """

    def __init__(
        self,
        bundle: Bundle,
        contract: Mod,
        windows: Array,
        batch: int,
        threads: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.windows = windows
        self._contract, self._batch, self._progress = contract, batch, progress
        self._decoder = Decoder(bundle, threads)
        self._everything = bundle.depth(1)
        self._done = 0

    def run(self, forced: Array) -> _Routes:
        """Run all windows, with the decisions of int64 [R, windows, window]; -1 leaves one to the router."""
        logs: list[RowLog] = []
        for start in range(0, len(self.windows), self._batch):
            rows = self.windows[start : start + self._batch]
            logs += self._run_rows(rows, forced[:, start : start + self._batch])
            self._done += len(rows)
            if self._progress is not None:
                self._progress(self._done, len(self.windows) * len(self._contract.routed_layers))
        return _Routes(logs, self._contract.routed_layers)

    def _run_rows(self, rows: Array, forced: Array) -> list[RowLog]:
        cache = self._decoder.cache(*rows.shape, record=True)
        if self._contract.prefill == "causal":
            self._decoder.prefill(cache, list(rows), forced=list(forced.swapaxes(0, 1)))
        else:  # the tokens of a prompt would compete, and a predictor would not be asked
            for position in range(rows.shape[1]):
                self._decoder.step(cache, rows[:, position], self._everything, forced=forced[:, :, position])
        assert cache.logs is not None
        return cache.logs


def _calibratable(bundle: Bundle) -> Mod:
    """The contract of a bundle that has thresholds."""
    contract = bundle.manifest.contract
    if not isinstance(contract, Mod):
        raise DynexportError(
            f"{bundle.path}: strategy: expected mod, whose routers have thresholds, found {contract.strategy}; "
            "name a bundle that was converted from a Mixture-of-Depths checkpoint"
        )
    if contract.decision.rule == "always":
        raise DynexportError(
            f"{bundle.path}: decision.rule: expected router or predictor, found always, which has no threshold; "
            "convert again with --set decision.rule=router"
        )
    # Further away float32 margins are too coarse to tell probabilities from each other.
    for layer in contract.routed_layers if contract.decision.rule == "predictor" else ():
        if not -1 <= contract.threshold(layer) <= 2:
            raise DynexportError(
                f"{bundle.path}: layer {layer}: expected a threshold near 0..1 to measure a predictor from, found "
                f"{contract.threshold(layer):g}; convert again with --set decision.threshold=0.5"
            )
    return contract


def _check_window(bundle: Bundle, window: int) -> None:
    model, routed = bundle.manifest.model, bundle.manifest.routed
    assert routed is not None
    limit = min(model.max_length, routed.slots)
    if is_integer(window) and window > routed.slots:
        raise DynexportError(
            f"window: expected at most {limit} tokens, as many as a routed layer's cache holds, so that none is turned "
            f"away, found {window}; choose a smaller --window, or convert with a larger cache.capacity"
        )
    checked_count("window", window, 1, limit)


def _rule(threshold: float, runs: Array, top: Array) -> Rule:
    return Rule(threshold=threshold, rate=float(runs.mean()), flips=float((runs != top).mean()))


__all__ = ["Calibration", "LayerCalibration", "Rule", "calibrate", "threshold_for", "top_k", "top_k_count"]
